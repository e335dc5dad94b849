#if defined(__x86_64__)
#define FEWBITS_W 8
#include "w8a8_kernel.hpp"

namespace fewbits::w8a8 {

Kernels avx2_kernels() { return {"avx2", false, kTile, product}; }

}  // namespace fewbits::w8a8
#endif
