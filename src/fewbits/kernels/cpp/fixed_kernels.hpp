// Packing and multiplying panels of codes, included once per instruction set (fixed_*.cpp).
#pragma once

#include <cstring>

#include "fixed.hpp"
#include "runs.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fewbits {
namespace {

constexpr int pairs_of(int depth) { return (depth + 3) / 4 * 2; }  // even: kernels take two at a time

inline float *scales_of(void *packed) { return static_cast<float *>(packed) + fixed_depth / 2 * fixed_panel; }
inline const float *scales_of(const void *packed) {
    return static_cast<const float *>(packed) + fixed_depth / 2 * fixed_panel;
}

// Codes of 2 * lanes values in order, two to a word.
inline void row_pairs(const float *x, vec reciprocal, std::int32_t *out) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const ivec low = codes_of(load(x), reciprocal), high = codes_of(load(x + lanes), reciprocal);
    const __m256i mixed = _mm256_packs_epi32((__m256i)low, (__m256i)high);  // halves of both, in turns
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_permute4x64_epi64(mixed, 0xd8));
#else
    alignas(64) std::int16_t codes[2 * lanes];
    for (int half = 0; half < 2; ++half) {
        const ivec c = codes_of(load(x + half * lanes), reciprocal);
        for (int l = 0; l < lanes; ++l) codes[half * lanes + l] = static_cast<std::int16_t>(c[l]);
    }
    std::memcpy(out, codes, sizeof codes);
#endif
}

// Codes of one row, pair after pair; the scale is returned.
inline float row_codes(const float *x, int depth, std::int32_t *out) {
    alignas(64) float padded[fixed_depth];
    if (depth < fixed_depth) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, x, depth * sizeof(float));
        x = padded;
    }
    ivec most[4] = {};  // one after the other would wait for each comparison
    for (int k = 0; k < fixed_depth; k += 4 * lanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) most[i] = imax(most[i], magnitude(load(x + k + i * lanes)));
    }
    float scale, reciprocal;
    scale_of(imax(imax(most[0], most[1]), imax(most[2], most[3])), fixed_most, &scale, &reciprocal);
    for (int k = 0; k < fixed_depth; k += 2 * lanes) row_pairs(x + k, splat(reciprocal), out + k / 2);
    return scale;
}

// Rows of 8 pairs become 8 columns: in[r][p] -> out[p][r].
inline void turn(const std::int32_t (*in)[fixed_depth / 2], std::int32_t *out) {
#if defined(__AVX2__)
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(in[r]));
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4) {
        a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        const __m256i low = _mm256_permute2x128_si256(a[r], a[r + 4], 0x20);
        const __m256i high = _mm256_permute2x128_si256(a[r], a[r + 4], 0x31);
        _mm256_store_si256(reinterpret_cast<__m256i *>(out + r * fixed_panel), low);
        _mm256_store_si256(reinterpret_cast<__m256i *>(out + (r + 4) * fixed_panel), high);
    }
#else
    for (int p = 0; p < 8; ++p) {
        for (int r = 0; r < 8; ++r) out[p * fixed_panel + r] = in[r][p];
    }
#endif
}

void fixed_pack(const float *x, std::int64_t stride, int rows, int depth, void *packed) {
    std::int32_t *out = static_cast<std::int32_t *>(packed);
    float *scale = scales_of(packed);
    alignas(64) std::int32_t eight[8][fixed_depth / 2];
    for (int first = 0; first < fixed_panel; first += 8) {
        for (int r = 0; r < 8; ++r) {
            if (first + r < rows) {
                const float *row = x + (first + r) * stride;
                fetch_ahead(row, stride, rows - first - r, depth);
                scale[first + r] = row_codes(row, depth, eight[r]);
            } else {
                scale[first + r] = 0.0f;
                std::memset(eight[r], 0, sizeof eight[r]);
            }
        }
        for (int p = 0; p < fixed_depth / 2; p += 8) {
            const auto *from = reinterpret_cast<const std::int32_t(*)[fixed_depth / 2]>(&eight[0][p]);
            turn(from, out + p * fixed_panel + first);
        }
    }
}

// Panels whose rows are columns of x: runs go down the rows of x.
void fixed_pack_columns(const float *x, std::int64_t stride, int columns, int depth, void *packed) {
    std::int32_t *out = static_cast<std::int32_t *>(packed);
    float *scale = scales_of(packed);
    alignas(64) float run[fixed_depth][lanes], reciprocal[lanes];
    for (int first = 0; first < fixed_panel; first += lanes) {
        const int left = columns - first, here = left < 0 ? 0 : left < lanes ? left : lanes;
        if (here < lanes || depth < fixed_depth) std::memset(run, 0, sizeof run);
        ivec most = {};
        for (int t = 0; t < depth && here; ++t) {
            const float *from = x + t * stride + first;
            if (here == lanes) {
                store(run[t], load(from));
            } else {
                for (int c = 0; c < here; ++c) run[t][c] = from[c];
            }
            most = imax(most, magnitude(load(run[t])));
        }
        for (int l = 0; l < lanes; ++l) scale_of(most[l], fixed_most, scale + first + l, reciprocal + l);
        const vec by = load(reciprocal);
        for (int p = 0; p < fixed_depth / 2; ++p) {
            const ivec even = codes_of(load(run[2 * p]), by), odd = codes_of(load(run[2 * p + 1]), by);
            const ivec pair = (even & isplat(0xffff)) | (odd << 16);
            std::memcpy(out + p * fixed_panel + first, &pair, sizeof pair);
        }
    }
}

void fixed_gram_pack(const GramJob &job, std::int64_t row, std::int64_t column, void *packed) {
    const std::int64_t rest = job.rows - row, left = job.columns - column;
    const float *x = static_cast<const float *>(job.x) + row * job.stride + column;
    const int depth = rest < fixed_depth ? static_cast<int>(rest) : fixed_depth;
    fixed_pack_columns(x, job.stride, left < fixed_panel ? static_cast<int>(left) : fixed_panel, depth, packed);
}

// e^x for x <= 0, relative error below 1e-7; NaN stays NaN. Powers of two by their exponent, the rest, within half an
// octave, by Taylor's polynomial of degree 7 (next term: 0.3466^8 / 8! = 5e-9).
inline vec exponential(vec x) {
    const vec bounded = vmax(x, splat(-87.0f)), n = round_even(bounded * splat(1.44269504f));
    const vec r = (bounded - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);  // ln 2 in two parts
    constexpr float taylor[7] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    vec e = splat(1.0f / 5040);
#pragma GCC unroll 7
    for (int i = 0; i < 7; ++i) e = e * r + splat(taylor[i]);
    const vec magic = splat(12582912.0f);
    const ivec power = (bits_of(n + magic) - bits_of(magic) + isplat(127)) << 23;
    return x == x ? e * as_float(power) : x;
}

void fixed_soften(float *s, std::int64_t stride, int rows, std::int64_t length, int step, float scale, float *sum) {
    for (int r = 0; r < rows; ++r) {
        float *row = s + r * stride;
        const std::int64_t here = length + r * step, whole = (here + lanes - 1) / lanes * lanes;
        for (std::int64_t t = here; t < whole; ++t) row[t] = -__builtin_inff();
        vec most = splat(-__builtin_inff());
        for (std::int64_t t = 0; t < whole; t += lanes) most = vmax(most, load(row + t));
        float top = most[0];
        for (int l = 1; l < lanes; ++l) top = most[l] > top ? most[l] : top;
        vec total = {};
        for (std::int64_t t = 0; t < whole; t += lanes) {
            const vec e = exponential((load(row + t) - splat(top)) * splat(scale));
            store(row + t, e);
            total += e;
        }
        for (std::int64_t t = here; t < whole; ++t) total[t % lanes] -= row[t];
        std::memset(row + here, 0, (stride - here) * sizeof(float));
        float all = 0.0f;
        for (int l = 0; l < lanes; ++l) all += total[l];
        sum[r] = all;
    }
}

#if defined(__AVX2__)

#define FEWBITS_ROW(offset, low, high)                      \
    "vpbroadcastd " #offset "(%[a]), %%ymm14\n\t"           \
    "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n\t"                \
    "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"                \
    "vpaddd %%ymm15, %%ymm" #low ", %%ymm" #low "\n\t"       \
    "vpaddd %%ymm14, %%ymm" #high ", %%ymm" #high "\n\t"
#define FEWBITS_EACH(say) \
    say(0) say(1) say(2) say(3) say(4) say(5) say(6) say(7) say(8) say(9) say(10) say(11)
#define FEWBITS_ZERO(i) "vpxor %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n\t"
#define FEWBITS_STORE(i) "vmovdqa %%ymm" #i ", 32*" #i "(%[sum])\n\t"

// Sums of products of 6 rows of a with 16 of b, [6][16]: 12 sums, two vectors of b, a splat and a product fill the 16
// registers. In assembler, since compilers load all six splats first and then spill sums, or copy every sum.
inline void fixed_sums(const std::int32_t *a, const std::int32_t *b, std::int64_t pairs, std::int32_t *sum) {
    static_assert(fixed_panel == 48, "the steps below are 4 * 48 bytes");
    __asm__ volatile(
        FEWBITS_EACH(FEWBITS_ZERO)
        ".p2align 5\n\t"
        "1:\n\t"
        "vmovdqa (%[b]), %%ymm12\n\t"
        "vmovdqa 32(%[b]), %%ymm13\n\t"
        FEWBITS_ROW(0, 0, 1) FEWBITS_ROW(4, 2, 3) FEWBITS_ROW(8, 4, 5)
        FEWBITS_ROW(12, 6, 7) FEWBITS_ROW(16, 8, 9) FEWBITS_ROW(20, 10, 11)
        "vmovdqa 192(%[b]), %%ymm12\n\t"
        "vmovdqa 224(%[b]), %%ymm13\n\t"
        FEWBITS_ROW(192, 0, 1) FEWBITS_ROW(196, 2, 3) FEWBITS_ROW(200, 4, 5)
        FEWBITS_ROW(204, 6, 7) FEWBITS_ROW(208, 8, 9) FEWBITS_ROW(212, 10, 11)
        "add $384, %[a]\n\t"
        "add $384, %[b]\n\t"
        "sub $2, %[pairs]\n\t"
        "jnz 1b\n\t"
        FEWBITS_EACH(FEWBITS_STORE)
        : [a] "+r"(a), [b] "+r"(b), [pairs] "+r"(pairs)
        : [sum] "r"(sum)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

inline void fixed_tile(const std::int32_t *a, const std::int32_t *b, const float *sa, const float *sb, int pairs,
                       bool add, float *out, std::int64_t stride) {
    alignas(32) std::int32_t sum[6 * 16];
    fixed_sums(a, b, pairs, sum);
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const __m256 exact = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<__m256i *>(sum + 16 * r + 8 * v)));
            const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(sa[r]), _mm256_loadu_ps(sb + 8 * v));
            float *to = out + r * stride + 8 * v;
            const __m256 before = add ? _mm256_loadu_ps(to) : _mm256_setzero_ps();
            _mm256_storeu_ps(to, _mm256_fmadd_ps(exact, scale, before));
        }
    }
}

constexpr int tile_rows = 6, tile_columns = 16;

#else

constexpr int tile_rows = 6, tile_columns = 8;

inline void fixed_tile(const std::int32_t *a, const std::int32_t *b, const float *sa, const float *sb, int pairs,
                       bool add, float *out, std::int64_t stride) {
    std::int32_t sum[tile_rows][tile_columns] = {};
    for (int p = 0; p < pairs; ++p, a += fixed_panel, b += fixed_panel) {
        for (int r = 0; r < tile_rows; ++r) {
            const std::int32_t low = static_cast<std::int16_t>(a[r]), high = a[r] >> 16;
            for (int c = 0; c < tile_columns; ++c) {
                sum[r][c] += low * static_cast<std::int16_t>(b[c]) + high * (b[c] >> 16);
            }
        }
    }
    for (int r = 0; r < tile_rows; ++r) {
        for (int c = 0; c < tile_columns; ++c) {
            float *to = out + r * stride + c;
            *to = static_cast<float>(sum[r][c]) * (sa[r] * sb[c]) + (add ? *to : 0.0f);
        }
    }
}

#endif

void fixed_multiply(const void *left, const void *right, int columns, int depth, bool add, float *out,
                    std::int64_t stride) {
    const std::int32_t *a = static_cast<const std::int32_t *>(left), *b = static_cast<const std::int32_t *>(right);
    const float *sa = scales_of(left), *sb = scales_of(right);
    const int pairs = pairs_of(depth);
    for (int column = 0; column < columns; column += tile_columns) {
        for (int row = 0; row < fixed_panel; row += tile_rows) {
            float *to = out + row * stride + column;
            fixed_tile(a + row, b + column, sa + row, sb + column, pairs, add, to, stride);
        }
    }
}

void fixed_gram_multiply(const void *left, const void *right, float *out) {
    fixed_multiply(left, right, fixed_panel, fixed_depth, false, out, fixed_panel);
}

void fixed_gram_add(const void *left, const void *right, float *g, std::int64_t stride) {
    fixed_multiply(left, right, fixed_panel, fixed_depth, true, g, stride);
}

const GramKernels fixed_gram = {fixed_panel,         fixed_depth, fixed_bytes, fixed_gram_pack,
                                fixed_gram_multiply, nullptr,     nullptr,     fixed_gram_add};
const FixedKernels fixed_all = {fixed_pack, fixed_pack_columns, fixed_multiply, fixed_soften, fixed_gram};

}  // namespace
}  // namespace fewbits
