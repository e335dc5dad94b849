#define FEWBITS_W 4
#define FEWBITS_TABLES
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {

Kernels portable_table_kernels() { return {"portable", product, nullptr, nullptr, dequantize}; }

}  // namespace fewbits::qlinear
