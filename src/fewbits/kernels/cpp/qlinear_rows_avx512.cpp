#if defined(__x86_64__)
#define FEWBITS_W 16
#include "qlinear_rows_kernel.hpp"

namespace fewbits::qlinear {

Kernels avx512_row_table_kernels() { return {"avx512", product_row_table, nullptr, nullptr, dequantize_row_table}; }

}  // namespace fewbits::qlinear
#endif
