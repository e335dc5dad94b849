#if defined(__x86_64__)
#define FEWBITS_W 16
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {

Kernels avx512_kernels() { return {"avx512", product, nullptr, nullptr, dequantize}; }

}  // namespace fewbits::qlinear
#endif
