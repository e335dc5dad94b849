#define FEWBITS_W 4
#include "w8a8_kernel.hpp"

namespace fewbits::w8a8 {

Kernels portable_kernels() { return {"portable", false, kTile, product}; }

}  // namespace fewbits::w8a8
