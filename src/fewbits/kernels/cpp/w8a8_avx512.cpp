#if defined(__x86_64__)
#define FEWBITS_W 16
#include "w8a8_kernel.hpp"

namespace fewbits::w8a8 {

Kernels avx512_kernels() { return {"avx512", true, kTile, product}; }

}  // namespace fewbits::w8a8
#endif
