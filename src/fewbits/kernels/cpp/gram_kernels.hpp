// x^T x in float32 fused multiply-adds, included once per instruction set (gram_*.cpp). bfloat16 is widened while
// packing: float32 products of bfloat16 are exact.
#pragma once

#include "gram.hpp"
#include "vec.hpp"

namespace fewbits {
namespace {

constexpr int gram_depth = 256;                                    // a packed panel fills 32 KiB
constexpr int gram_rows = lanes == 16 ? 8 : 4, gram_vectors = 2;  // accumulators that fit the register file

inline float element(const GramJob &job, std::int64_t row, std::int64_t column) {
    const std::int64_t at = row * job.stride + column;
    if (!job.bfloat) return static_cast<const float *>(job.x)[at];
    const std::uint32_t wide = static_cast<std::uint32_t>(static_cast<const std::uint16_t *>(job.x)[at]) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

void gram_pack(const GramJob &job, std::int64_t row, std::int64_t column, void *packed) {
    float *out = static_cast<float *>(packed);
    const std::int64_t left = job.columns - column, width = left < panel ? left : panel;
    for (int t = 0; t < gram_depth; ++t, out += panel) {
        const std::int64_t here = row + t < job.rows ? width : 0;
        if (here == panel) {
            for (int c = 0; c < panel; ++c) out[c] = element(job, row + t, column + c);
        } else {
            for (int c = 0; c < panel; ++c) out[c] = c < here ? element(job, row + t, column + c) : 0.0f;
        }
    }
}

void gram_multiply(const void *left, const void *right, float *out) {
    for (int column = 0; column < panel; column += gram_vectors * lanes) {
        for (int row = 0; row < panel; row += gram_rows) {
            const float *a = static_cast<const float *>(left) + row, *b = static_cast<const float *>(right) + column;
            vec sum[gram_rows][gram_vectors] = {};
            for (int t = 0; t < gram_depth; ++t, a += panel, b += panel) {
                const vec b0 = load(b), b1 = load(b + lanes);
#pragma GCC unroll 8
                for (int r = 0; r < gram_rows; ++r) {
                    const vec x = splat(a[r]);
                    sum[r][0] += x * b0;
                    sum[r][1] += x * b1;
                }
            }
            for (int r = 0; r < gram_rows; ++r) {
                for (int v = 0; v < gram_vectors; ++v) store(out + (row + r) * panel + column + v * lanes, sum[r][v]);
            }
        }
    }
}

const GramKernels gram_kernels = {gram_depth, gram_depth * panel * 4, gram_pack, gram_multiply, nullptr, nullptr};

}  // namespace
}  // namespace fewbits
