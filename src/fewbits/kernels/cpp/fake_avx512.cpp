#include "fake_kernels.hpp"

namespace fewbits {

const FakeKernels &fake_avx512() {
    static const FakeKernels kernels = {forward, backward};
    return kernels;
}

}  // namespace fewbits
