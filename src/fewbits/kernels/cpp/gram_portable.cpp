#include "gram_kernels.hpp"

namespace fewbits {

const GramKernels &gram_portable() { return gram_kernels; }

}  // namespace fewbits
