#if defined(__x86_64__)
#define FEWBITS_W 8
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {

Kernels avx2_kernels() { return {"avx2", product, nullptr, dequantize}; }

}  // namespace fewbits::qlinear
#endif
