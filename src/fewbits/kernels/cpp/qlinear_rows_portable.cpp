#define FEWBITS_W 4
#include "qlinear_rows_kernel.hpp"

namespace fewbits::qlinear {

Kernels portable_row_table_kernels() { return {"portable", product_row_table, nullptr, nullptr, dequantize_row_table}; }

}  // namespace fewbits::qlinear
