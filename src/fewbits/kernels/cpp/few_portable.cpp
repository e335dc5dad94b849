#include "few_kernels.hpp"

namespace fewbits {

const FewKernels &few_portable() { return few_all; }

}  // namespace fewbits
