#include "gram_kernels.hpp"

namespace fewbits {

const GramKernels &gram_avx2() { return gram_kernels; }

}  // namespace fewbits
