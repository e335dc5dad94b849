// Products of float32 matrices in fixed point: every run of up to `fixed_depth` values along the dimension that is summed
// gets a scale of its own and codes of 13 bits, whose products are summed exactly in 32 bits. For processors that
// multiply two 16-bit integers where they multiply one float32, and have no bfloat16 (AVX2: VPMADDWD).
// gram.cpp and fixed.cpp drive; the kernels are serial and compiled per instruction set.
#pragma once

#include <cstdint>

#include "gram.hpp"

namespace fewbits {

constexpr int fixed_panel = 48;   // rows of an operand packed together
constexpr int fixed_depth = 128;  // values of a row that share a scale
constexpr int fixed_most = 4095;  // fixed_depth * fixed_most^2 < 2^31
// A packed panel: [fixed_depth / 2][fixed_panel] pairs of codes, then [fixed_panel] scales.
constexpr std::int64_t fixed_bytes = fixed_depth / 2 * fixed_panel * 4 + fixed_panel * 4;

struct FixedKernels {
    // Packs `depth` values of each of `rows` rows of x, `stride` elements apart; rows that are missing become zero.
    void (*pack)(const float *x, std::int64_t stride, int rows, int depth, void *packed);
    // The same where a row of the panel is a column of x: `depth` rows of x, `columns` columns.
    void (*pack_columns)(const float *x, std::int64_t stride, int columns, int depth, void *packed);
    // out[panel, columns] = or += (panel a) (panel b)^T over `depth` values; rows of out are `stride` apart. Of b only
    // the first `columns` rows are used, rounded up to 16.
    void (*multiply)(const void *a, const void *b, int columns, int depth, bool add, float *out, std::int64_t stride);
    // Rows s[r], `stride` apart, become exp(scale * s[r][t] - max) for t < length + r * step, and zero from there to
    // `stride`; sum[r] is their sum.
    void (*soften)(float *s, std::int64_t stride, int rows, std::int64_t length, int step, float scale, float *sum);
    const GramKernels &gram;
};

const FixedKernels &fixed_portable();
const FixedKernels &fixed_avx2();
const FixedKernels &fixed_kernels();  // for this CPU

struct FixedJob {
    const float *x, *w, *bias;  // [tokens, columns], [out, columns], [out] or null
    float *y;                   // [tokens, out]
    std::int64_t tokens, columns, out, x_stride, w_stride;
};

// y = x w^T + bias
void fixed_linear(const FixedJob &job, int threads);

// softmax(scale q k^T) v with q [batch, heads, tokens, width] and k, v [batch, kv_heads, tokens, width]; elements of a row
// are consecutive, everything else has its strides (batch, head, token). y is [batch, tokens, heads, width].
struct AttentionJob {
    const float *q, *k, *v;
    float *y;
    std::int64_t batch, heads, kv_heads, tokens, width;
    std::int64_t q_stride[3], k_stride[3], v_stride[3];
    float scale;
    bool causal;
};

void fixed_attention(const AttentionJob &job, int threads);

}  // namespace fewbits
