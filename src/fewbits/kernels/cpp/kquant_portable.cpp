#include "kquant_kernels.hpp"

namespace fewbits {

const BlockKernels &kquant_portable() {
    static const BlockKernels kernels = {search};
    return kernels;
}

}  // namespace fewbits
