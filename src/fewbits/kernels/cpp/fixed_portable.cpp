#include "fixed_kernels.hpp"

namespace fewbits {

const FixedKernels &fixed_portable() { return fixed_all; }

}  // namespace fewbits
