#include "fixed_kernels.hpp"

namespace fewbits {

const FixedKernels &fixed_avx2() { return fixed_all; }

}  // namespace fewbits
