// x^T x in float32 fused multiply-adds, included once per instruction set (gram_*.cpp). bfloat16 is widened while
// packing: float32 products of bfloat16 are exact.
#pragma once

#include "gram.hpp"
#include "vec.hpp"

namespace fewbits {
namespace {

constexpr int gram_rows = lanes == 16 ? 8 : 4, gram_vectors = lanes == 16 ? 2 : 3;  // accumulators fill the registers
constexpr int strip = gram_vectors * lanes;  // columns that lie together: a strip of `depth` rows stays in the first cache
constexpr int panel = lanes == 16 ? 32 : 48, gram_depth = lanes == 16 ? 256 : 128;
static_assert(panel <= widest_panel && panel % strip == 0 && strip % gram_rows == 0, "tiles must fill a panel");

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
    for (std::int64_t first = column; first < column + panel; first += strip) {
        const std::int64_t left = job.columns - first, width = left < 0 ? 0 : left < strip ? left : strip;
        for (int t = 0; t < gram_depth; ++t, out += strip) {
            const std::int64_t here = row + t < job.rows ? width : 0;
            if (here == strip) {
                for (int c = 0; c < strip; ++c) out[c] = element(job, row + t, first + c);
            } else {
                for (int c = 0; c < strip; ++c) out[c] = c < here ? element(job, row + t, first + c) : 0.0f;
            }
        }
    }
}

// A tile of gram_rows by strip: a and b walk down one strip each.
inline void gram_tile(const float *a, const float *b, float *out) {
    vec sum[gram_rows][gram_vectors] = {};
    for (int t = 0; t < gram_depth; ++t, a += strip, b += strip) {
        vec right[gram_vectors];
#pragma GCC unroll 4
        for (int v = 0; v < gram_vectors; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < gram_rows; ++r) {
            const vec x = splat(a[r]);
#pragma GCC unroll 4
            for (int v = 0; v < gram_vectors; ++v) sum[r][v] += x * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < gram_rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < gram_vectors; ++v) store(out + r * panel + v * lanes, sum[r][v]);
    }
}

void gram_multiply(const void *left, const void *right, float *out) {
    for (int column = 0; column < panel; column += strip) {
        const float *b = static_cast<const float *>(right) + column * gram_depth;
        for (int row = 0; row < panel; row += gram_rows) {
            const float *a = static_cast<const float *>(left) + row / strip * strip * gram_depth + row % strip;
            gram_tile(a, b, out + row * panel + column);
        }
    }
}

const GramKernels gram_kernels = {panel, gram_depth, gram_depth * panel * 4, gram_pack, gram_multiply, nullptr, nullptr};

}  // namespace
}  // namespace fewbits
