#include "kquant_kernels.hpp"

namespace fewbits {

const BlockKernels &kquant_avx2() {
    static const BlockKernels kernels = {search};
    return kernels;
}

}  // namespace fewbits
