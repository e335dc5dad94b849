#if defined(__x86_64__)
#define FEWBITS_W 16
#define FEWBITS_TABLES
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {

Kernels avx512_table_kernels() { return {"avx512", product, nullptr, nullptr, dequantize}; }

}  // namespace fewbits::qlinear
#endif
