// What each block type does with the searches; included once per instruction set (kquant_*.cpp).
#pragma once

#include "kquant_search.hpp"

namespace fewbits {
namespace {

// ---- blocks of 32 ------------------------------------------------------------------------------------------------------

// One scale, codes 0 .. 2*top-1 around `top`: Q4_0, Q5_0.
inline void symmetric32(const BlockJob &job, Batch<32> &b, int top) {
    if (b.weighted) {
        weigh(b, b.energy);
        b.store_half(job.d, symmetric_scale<32>(b.x, b.w, top, b.q));
        return;
    }
    const V d = peak<32>(b.x).value / vs(static_cast<float>(-top));
    const V inverse = d != V{} ? vs(1.0f) / d : V{};
    b.store_half(job.d, d);
    for (int c = 0; c < 32; ++c) {
        const I n = trunc_int(b.x[c] * inverse + vs(static_cast<float>(top) + 0.5f)) << 24 >> 24;
        b.q[c] = n > is(2 * top - 1) ? is(2 * top - 1) : n;
    }
}

// Scale and offset, codes 0 .. top: Q4_1, Q5_1.
inline void affine32(const BlockJob &job, Batch<32> &b, int top) {
    if (b.weighted) {
        weigh(b, b.energy);
        V offset;
        b.store_half(job.d, affine_scale<32>(b.x, b.w, top, {-0.9f, 0.05f, 36, false}, b.q, &offset));
        b.store_half(job.m, -offset);
        return;
    }
    V low = b.x[0], high = b.x[0];
    for (int c = 1; c < 32; ++c) {
        low = b.x[c] < low ? b.x[c] : low;
        high = b.x[c] > high ? b.x[c] : high;
    }
    const V d = (high - low) / vs(static_cast<float>(top)), inverse = d != V{} ? vs(1.0f) / d : V{};
    b.store_half(job.d, d);
    b.store_half(job.m, low);
    for (int c = 0; c < 32; ++c) {
        const I n = trunc_int((b.x[c] - low) * inverse + vs(0.5f)) & is(0xff);
        b.q[c] = top == 15 ? (n > is(15) ? is(15) : n) : n & is(31);
    }
}

inline I round_away(V x) {  // ties away from zero, |x| < 2^22
    const I whole = trunc_int(x);
    const V rest = vabs8(x - real(whole));
    return whole + (rest >= vs(0.5f) ? (x < V{} ? is(-1) : is(1)) : I{});
}

// Codes by the largest magnitude alone, ties away from zero: Q8_0 (top 127), and the ternary types (top 1).
template <int B>
inline void absolute(const BlockJob &job, Batch<B> &b, int top, int zero) {
    const V d = peak<B>(b.x).size / vs(static_cast<float>(top)), inverse = d != V{} ? vs(1.0f) / d : V{};
    b.store_half(job.d, d);
    for (int c = 0; c < B; ++c) b.q[c] = round_away(b.x[c] * inverse) + is(zero);
}

inline void mxfp4(const BlockJob &job, Batch<32> &b) {
    constexpr float values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const V size = peak<32>(b.x).size;
    V scale;
    for (int k = 0; k < L8; ++k) {
        const int e = size[k] > 0 ? static_cast<int>(__builtin_floorf(__builtin_log2f(size[k]))) - 2 + 127 : 0;
        const std::uint32_t byte = static_cast<std::uint8_t>(e);
        const std::uint32_t bits = byte < 2 ? 0x00200000u << byte : (byte - 1) << 23;
        float s;
        std::memcpy(&s, &bits, 4);
        scale[k] = s;
        if (k < b.count) job.d[b.first + k] = static_cast<std::uint16_t>(byte);
    }
    for (int c = 0; c < 32; ++c) {
        V best = vabs8(-b.x[c]);
        I code = {};
        for (int n = 1; n < 16; ++n) {
            const V error = vabs8(vs(values[n]) * scale - b.x[c]);
            const I better = error < best;
            best = better ? error : best;
            code = better ? is(n) : code;
        }
        b.q[c] = code;
    }
}

inline void table32(const BlockJob &job, Batch<32> &b) {
    if (b.weighted) {
        weigh(b, squares<32>(b.x) * vs(2.0f / 32));
    } else {
        for (int c = 0; c < 32; ++c) b.w[c] = b.x[c] * b.x[c];
    }
    const V d = table_scale<32>(b.x, b.w), inverse = d != V{} ? vs(1.0f) / d : V{};
    b.store_half(job.d, d);
    for (int c = 0; c < 32; ++c) b.q[c] = table_index(inverse * b.x[c]);
}

// ---- super-blocks of 256 -------------------------------------------------------------------------------------------------

struct Largest {
    V value, size;
};

template <int S>
inline Largest largest(const V (&scale)[S]) {
    const Peak p = peak<S>(scale);
    return {p.value, p.size};
}

// How the sub-blocks of a type with offsets are searched and weighed.
struct AffineRule {
    int top, scale_top;
    Stretch plain;
    float sigma;         // importance is weighed with sigma * mean square of the super-block
    bool rms;            // without importance: root mean square of the sub-block is added to |x|
    bool clamp;          // scale codes are clamped to scale_top
};

// Q2_K, Q4_K, Q5_K: N weights per sub-block, scale and offset per sub-block in integers, two halves per super-block.
template <int N>
inline void affine256(const BlockJob &job, Batch<256> &b, const AffineRule &rule) {
    constexpr int S = 256 / N;
    V scale[S], offset[S], weight[S];
    if (b.weighted) weigh(b, vs(rule.sigma) * squares<256>(b.x) / vs(256.0f));
    for (int j = 0; j < S; ++j) {
        const V *x = b.x + j * N;
        V *w = b.w + j * N;
        if (!b.weighted) {
            const V base = rule.rms ? root(squares<N>(x) / vs(static_cast<float>(N))) : V{};
            for (int i = 0; i < N; ++i) w[i] = rule.rms ? base + vabs8(x[i]) : vabs8(x[i]);
        }
        const Stretch stretch = b.weighted ? Stretch{-0.9f, 0.05f, 36, false} : rule.plain;
        weight[j] = total<N>(w);
        scale[j] = affine_scale<N>(x, w, rule.top, stretch, b.q + j * N, &offset[j]);
    }
    I sc[S], mn[S];
    V d, m;
    if (b.weighted) {
        d = positive_scale<S>(scale, weight, rule.scale_top, sc);
        m = positive_scale<S>(offset, weight, rule.scale_top, mn);
    } else {
        const auto nearest_codes = [&](const V(&v)[S], I(&code)[S]) {
            V high = {};
            for (int j = 0; j < S; ++j) high = v[j] > high ? v[j] : high;
            const float levels = static_cast<float>(rule.scale_top);
            const V inverse = high > V{} ? vs(levels) / high : V{};
            for (int j = 0; j < S; ++j) {
                const I n = nearest(inverse * v[j]) & is(0xff);
                code[j] = rule.clamp ? (n > is(rule.scale_top) ? is(rule.scale_top) : n) : n;
            }
            return high > V{} ? high / vs(levels) : V{};
        };
        d = nearest_codes(scale, sc);
        m = nearest_codes(offset, mn);
    }
    const V stored_d = b.store_half(job.d, d), stored_m = b.store_half(job.m, m);
    for (int j = 0; j < S; ++j) {
        const V step = stored_d * real(sc[j]), shift = stored_m * real(mn[j]);
        const I keep = step == V{};
        for (int c = j * N; c < (j + 1) * N; ++c)
            b.q[c] = keep ? b.q[c] : clamp_int(nearest((b.x[c] + shift) / step), 0, rule.top);
    }
    b.store_subs<S>(job.scales, sc);
    b.store_subs<S>(job.mins, mn);
}

// Codes again for the scales as stored, where those are not zero: Q3_K, Q6_K.
inline void recode256(Batch<256> &b, V d, const I (&sc)[16], int top) {
    for (int j = 0; j < 16; ++j) {
        const V step = d * real(sc[j]);
        const I keep = step == V{};
        for (int c = 16 * j; c < 16 * j + 16; ++c)
            b.q[c] = keep ? b.q[c] : clamp_int(nearest(b.x[c] / step), -top, top - 1) + is(top);
    }
}

inline void q3_k(const BlockJob &job, Batch<256> &b) {
    V scale[16], weight[16], d;
    I sc[16];
    if (b.weighted) {
        weigh(b, vs(2.0f) * squares<256>(b.x) / vs(256.0f));
        for (int j = 0; j < 16; ++j) {
            weight[j] = total<16>(b.w + 16 * j);
            scale[j] = symmetric_scale<16>(b.x + 16 * j, b.w + 16 * j, 4, b.q + 16 * j);
        }
        d = symmetric_scale<16>(scale, weight, 32, sc);
        for (int j = 0; j < 16; ++j) sc[j] -= is(32);
    } else {
        for (int j = 0; j < 16; ++j) scale[j] = symmetric_ascent<16>(b.x + 16 * j, 4, b.q + 16 * j);
        const V most = largest(scale).value;
        const I empty = most == V{};
        const V inverse = vs(-32.0f) / most;
        for (int j = 0; j < 16; ++j)
            sc[j] = empty ? is(-32) : clamp_int(nearest(inverse * scale[j]) << 24 >> 24, -32, 31);
        d = empty ? V{} : vs(1.0f) / inverse;
    }
    recode256(b, b.store_half(job.d, d), sc, 4);
    b.store_subs<16>(job.scales, sc);
}

inline void q6_k(const BlockJob &job, Batch<256> &b) {
    V scale[16];
    I sc[16];
    if (!b.weighted)
        for (int c = 0; c < 256; ++c) b.w[c] = b.x[c] * b.x[c];
    for (int j = 0; j < 16; ++j)
        scale[j] = symmetric_scale<16>(b.x + 16 * j, b.w + 16 * j, 32, b.q + 16 * j);
    const Largest most = largest(scale);
    const I empty = most.size < vs(nothing);
    const V inverse = vs(-128.0f) / most.value;
    for (int j = 0; j < 16; ++j) {
        const I n = nearest(inverse * scale[j]);
        sc[j] = empty ? I{} : (n > is(127) ? is(127) : n) << 24 >> 24;
    }
    recode256(b, b.store_half(job.d, empty ? V{} : vs(1.0f) / inverse), sc, 32);
    for (int c = 0; c < 256; ++c) b.q[c] = empty ? I{} : b.q[c];
    b.store_subs<16>(job.scales, sc);
}

inline void iq4_xs(const BlockJob &job, Batch<256> &b) {
    V scale[8];
    I sc[8];
    if (b.weighted) {
        weigh(b, squares<256>(b.x) * vs(2.0f / 256));
    } else {
        for (int c = 0; c < 256; ++c) b.w[c] = b.x[c] * b.x[c];
    }
    for (int j = 0; j < 8; ++j) scale[j] = table_scale<32>(b.x + 32 * j, b.w + 32 * j);
    const V d = -largest(scale).value / vs(32.0f), inverse = d != V{} ? vs(1.0f) / d : V{};
    b.store_half(job.d, d);
    for (int j = 0; j < 8; ++j) {
        sc[j] = clamp_int(nearest(inverse * scale[j]), -32, 31);
        const V step = d * real(sc[j]), over = step != V{} ? vs(1.0f) / step : V{};
        for (int c = 32 * j; c < 32 * j + 32; ++c) b.q[c] = table_index(over * b.x[c]);
    }
    b.store_subs<8>(job.scales, sc);
}

// ---- dispatch ------------------------------------------------------------------------------------------------------------

inline void one(const BlockJob &job, Batch<32> &b) {
    switch (job.type) {
        case BlockType::q4_0: return symmetric32(job, b, 8);
        case BlockType::q5_0: return symmetric32(job, b, 16);
        case BlockType::q4_1: return affine32(job, b, 15);
        case BlockType::q5_1: return affine32(job, b, 31);
        case BlockType::q8_0: return absolute<32>(job, b, 127, 128);
        case BlockType::mxfp4: return mxfp4(job, b);
        default: return table32(job, b);
    }
}

inline void one(const BlockJob &job, Batch<256> &b) {
    switch (job.type) {
        case BlockType::q2_k: return affine256<16>(job, b, {3, 15, {-0.5f, 0.1f, 15, true}, 1.0f, false, false});
        case BlockType::q4_k: return affine256<32>(job, b, {15, 63, {-1.0f, 0.1f, 20, false}, 2.0f, true, true});
        case BlockType::q5_k: return affine256<32>(job, b, {31, 63, {-0.5f, 0.1f, 15, false}, 2.0f, true, true});
        case BlockType::q3_k: return q3_k(job, b);
        case BlockType::q6_k: return q6_k(job, b);
        case BlockType::iq4_xs: return iq4_xs(job, b);
        default: return absolute<256>(job, b, 1, 1);
    }
}

template <int B>
inline void each(const BlockJob &job, std::int64_t begin, std::int64_t end) {
    Batch<B> batch;
    for (std::int64_t i = begin; i < end; i += L8) {
        batch.load(job, i, end);
        one(job, batch);
        batch.store_codes(job);
    }
}

void search(const BlockJob &job, std::int64_t begin, std::int64_t end) {
    switch (job.type) {
        case BlockType::q2_k: case BlockType::q3_k: case BlockType::q4_k: case BlockType::q5_k: case BlockType::q6_k:
        case BlockType::iq4_xs: case BlockType::tq1_0: case BlockType::tq2_0:
            return each<256>(job, begin, end);
        default:
            return each<32>(job, begin, end);
    }
}

}  // namespace
}  // namespace fewbits
