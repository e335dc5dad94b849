// Rows of a product, computed panel by panel, on their way into y.
#pragma once

#include <cstdint>
#include <cstring>

namespace fewbits {

// Fetches where `rows` rows of `columns` values will be written, `stride` elements apart, while they are computed: such
// pieces are too short for the processor to foresee the next.
inline void expect(const float *y, std::int64_t stride, int rows, int columns) {
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < columns; c += 16) __builtin_prefetch(y + r * stride + c, 1);
    }
}

// y = product + bias, if there is one; `step` values from row to row of the product.
inline void put(float *y, std::int64_t stride, const float *product, int step, int rows, int columns, const float *bias) {
    for (int r = 0; r < rows; ++r, y += stride, product += step) {
        if (bias) {
            for (int c = 0; c < columns; ++c) y[c] = product[c] + bias[c];
        } else {
            std::memcpy(y, product, columns * sizeof(float));
        }
    }
}

}  // namespace fewbits
