// Eight blocks at a time, one per lane, so that every sum of a block stays sequential and has the bits of scalar code.
#pragma once

#include <cstdint>
#include <cstring>

#include "kquant.hpp"

namespace fewbits {
namespace {

constexpr int L8 = 8;
typedef float V __attribute__((vector_size(32)));
typedef std::int32_t I __attribute__((vector_size(32)));

inline V vs(float x) { return x - V{}; }
inline I is(std::int32_t x) { return x - I{}; }
inline I raw(V v) { return reinterpret_cast<I>(v); }
inline V real(I v) { return __builtin_convertvector(v, V); }
inline I trunc_int(V v) {  // x86 turns what does not fit into the smallest integer; so must we
    const I in_range = (v > vs(-2147483648.0f)) & (v < vs(2147483648.0f));
    const V safe = in_range ? v : V{};
    return in_range ? __builtin_convertvector(safe, I) : is(INT32_MIN);
}
inline V vabs8(V v) { return reinterpret_cast<V>(raw(v) & is(0x7fffffff)); }
inline I clamp_int(I x, int low, int high) {
    x = x < is(low) ? is(low) : x;
    return x > is(high) ? is(high) : x;
}
inline bool any(I mask) {
    std::int32_t m = 0;
    for (int k = 0; k < L8; ++k) m |= mask[k];
    return m != 0;
}
inline V root(V x) {
    V r;
    for (int k = 0; k < L8; ++k) r[k] = __builtin_sqrtf(x[k]);
    return r;
}

// Nearest integer, ties to even, by adding 1.5 * 2^23: exact below 2^22, and beyond it what the reference makes of it.
inline I nearest(V x) { return (raw(x + vs(12582912.0f)) & is(0x007fffff)) - is(0x00400000); }

inline std::uint16_t to_half(float x) {
    std::uint32_t b;
    std::memcpy(&b, &x, 4);
    const std::uint32_t sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
    if (a > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (a >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (a < 0x38800000u) {  // subnormal: floats in [0.5, 1) are as far apart as these halves
        float f;
        std::memcpy(&f, &a, 4);
        const float shifted = f + 0.5f;
        std::uint32_t c;
        std::memcpy(&c, &shifted, 4);
        return static_cast<std::uint16_t>(sign | (c - 0x3f000000u));
    }
    const std::uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float from_half(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, e = (h >> 10) & 31u, f = h & 1023u;
    std::uint32_t b = sign;
    if (e == 31u) {
        b |= 0x7f800000u | (f << 13);
    } else if (e != 0u) {
        b |= ((e + 112u) << 23) | (f << 13);
    } else if (f != 0u) {
        const float value = static_cast<float>(f) * 5.9604644775390625e-8f;
        std::uint32_t c;
        std::memcpy(&c, &value, 4);
        b |= c;
    }
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}

// Eight blocks of B columns, transposed: x[c] holds column c of every block.
template <int B>
struct Batch {
    V x[B], w[B];        // weights, and importance if there is one
    V energy;            // mean square of each block's row
    I q[B];              // result: codes
    std::int64_t first;  // index of the block in lane 0
    int count;           // lanes that are real; the others repeat the last one
    bool weighted;

    void load(const BlockJob &job, std::int64_t begin, std::int64_t end) {
        first = begin;
        count = static_cast<int>(end - begin < L8 ? end - begin : L8);
        weighted = job.importance != nullptr;
        const std::int64_t per_row = job.columns / B;
        for (int k = 0; k < L8; ++k) {
            const std::int64_t block = begin + (k < count ? k : count - 1);
            const float *from = job.x + block * B;
            for (int c = 0; c < B; ++c) x[c][k] = from[c];
            if (!weighted) continue;
            const float *imp = job.importance + (block % per_row) * B;
            for (int c = 0; c < B; ++c) w[c][k] = imp[c];
            energy[k] = job.energy ? job.energy[block / per_row] : 0.0f;
        }
    }

    void store_codes(const BlockJob &job) const {
        for (int k = 0; k < count; ++k) {
            std::uint8_t *to = job.codes + (first + k) * B;
            for (int c = 0; c < B; ++c) to[c] = static_cast<std::uint8_t>(q[c][k]);
        }
    }

    // Stores a value per block as half and returns it as it was stored.
    V store_half(std::uint16_t *to, V value) const {
        V stored;
        for (int k = 0; k < L8; ++k) {
            const std::uint16_t h = to_half(value[k]);
            stored[k] = from_half(h);
            if (k < count) to[first + k] = h;
        }
        return stored;
    }

    // Stores sub-block codes, `S` per block.
    template <int S>
    void store_subs(std::int8_t *to, const I (&value)[S]) const {
        for (int k = 0; k < count; ++k)
            for (int j = 0; j < S; ++j) to[(first + k) * S + j] = static_cast<std::int8_t>(value[j][k]);
    }
};

// w becomes importance * sqrt(sigma2 + x^2).
template <int B>
inline void weigh(Batch<B> &b, V sigma2) {
    for (int c = 0; c < B; ++c) b.w[c] = b.w[c] * root(sigma2 + b.x[c] * b.x[c]);
}

template <int N>
inline V squares(const V *x) {
    V sum = {};
    for (int i = 0; i < N; ++i) sum += x[i] * x[i];
    return sum;
}

template <int N>
inline V total(const V *x) {
    V sum = {};
    for (int i = 0; i < N; ++i) sum += x[i];
    return sum;
}

}  // namespace
}  // namespace fewbits
