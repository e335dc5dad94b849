#define FEWBITS_W 4
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {

Kernels portable_kernels() { return {"portable", product, nullptr, nullptr, dequantize}; }

}  // namespace fewbits::qlinear
