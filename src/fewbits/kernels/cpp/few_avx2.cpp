#include "few_kernels.hpp"

namespace fewbits {

const FewKernels &few_avx2() { return few_all; }

}  // namespace fewbits
