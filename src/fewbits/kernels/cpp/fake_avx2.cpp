#include "fake_kernels.hpp"

namespace fewbits {

const FakeKernels &fake_avx2() {
    static const FakeKernels kernels = {forward, backward};
    return kernels;
}

}  // namespace fewbits
