// Rows of a product, computed panel by panel, on their way into y.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fewbits {

// Whether y is larger than what stays in a cache until it is read: then it is written past the caches, since fetching its
// lines first would cost as much as writing them.
inline bool outgrows_caches(std::int64_t rows, std::int64_t columns) { return rows * columns >= (4 << 20); }

// y = product + bias, if there is one; `step` values from row to row of the product. Only whole lines go past the caches.
inline void put(float *y, std::int64_t stride, const float *product, int step, int rows, int columns, const float *bias,
                bool past_caches) {
#if defined(__SSE2__)
    if (past_caches && !bias && reinterpret_cast<std::uintptr_t>(y) % 64 == 0 && stride % 16 == 0 && columns % 16 == 0) {
        for (int r = 0; r < rows; ++r, y += stride, product += step) {
            for (int c = 0; c < columns; c += 4) _mm_stream_ps(y + c, _mm_loadu_ps(product + c));
        }
        _mm_sfence();
        return;
    }
#endif
    (void)past_caches;
    for (int r = 0; r < rows; ++r, y += stride, product += step) {
        if (bias) {
            for (int c = 0; c < columns; ++c) y[c] = product[c] + bias[c];
        } else {
            std::memcpy(y, product, columns * sizeof(float));
        }
    }
}

}  // namespace fewbits
