#include "gram_kernels.hpp"

namespace fewbits {

const GramKernels &gram_avx512() { return gram_kernels; }

}  // namespace fewbits
