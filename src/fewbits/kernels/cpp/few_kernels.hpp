// Packing and multiplying panels of bytes, included once per instruction set (few_*.cpp).
#pragma once

#include <cstring>

#include "few.hpp"
#include "runs.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fewbits {
namespace {

constexpr int few_words = few_run / 4;
constexpr std::int64_t few_step = few_bytes / 4;  // words from run to run

inline float *floats_of(void *packed) { return static_cast<float *>(packed) + few_words * few_panel; }
inline const float *floats_of(const void *packed) { return static_cast<const float *>(packed) + few_words * few_panel; }

// Codes of one run, four to a word; its scale and the sum of its codes.
inline void run_codes(const float *x, int depth, std::int32_t *out, float *scale, float *sum) {
    alignas(64) float padded[few_run];
    if (depth < few_run) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, x, depth * sizeof(float));
        x = padded;
    }
    ivec most = {};
    for (int k = 0; k < few_run; k += lanes) most = imax(most, magnitude(load(x + k)));
    float reciprocal;
    scale_of(most, few_most, scale, &reciprocal);
    const vec by = splat(reciprocal);
    ivec codes[few_run / lanes], all = {};
    for (int i = 0; i < few_run / lanes; ++i) {
        codes[i] = codes_of(load(x + i * lanes), by);
        all += codes[i];
    }
    std::int32_t total = 0;
    for (int l = 0; l < lanes; ++l) total += all[l];
    *sum = *scale * static_cast<float>(total);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i low = _mm256_packs_epi32((__m256i)codes[0], (__m256i)codes[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)codes[2], (__m256i)codes[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing takes halves in turns
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), bytes);
#else
    alignas(64) std::int8_t bytes[few_run];
    for (int k = 0; k < few_run; ++k) bytes[k] = static_cast<std::int8_t>(codes[k / lanes][k % lanes]);
    std::memcpy(out, bytes, sizeof bytes);
#endif
}

void few_pack(const float *x, std::int64_t stride, int rows, int depth, void *packed) {
    std::int32_t *out = static_cast<std::int32_t *>(packed);
    float *scale = floats_of(packed), *sum = scale + few_panel;
    for (int r = 0; r < few_panel; ++r) {
        alignas(64) std::int32_t words[few_words] = {};
        scale[r] = sum[r] = 0.0f;
        if (r < rows) {
            const float *row = x + r * stride;
            fetch_ahead(row, stride, rows - r, depth);
            run_codes(row, depth, words, scale + r, sum + r);
        }
        for (int q = 0; q < few_words; ++q) out[q * few_panel + r] = words[q];
    }
}

// out = -(sums of x) (scale * zero point of w)^T, added up over groups: what the zero points take away.
inline void few_zeros(const float *sums, const std::int32_t *w, std::int64_t runs, std::int64_t per_group, float *out) {
    constexpr int rows = 4, vectors = 2;
    for (int c = 0; c < few_panel; c += vectors * lanes) {
        for (int r = 0; r < few_panel; r += rows) {
            vec taken[rows][vectors] = {};
            for (std::int64_t run = 0, group = 0; run < runs; run += per_group, ++group) {
                const float *zeros = floats_of(w + run * few_step) + few_panel + c, *sum = sums + group * few_panel + r;
#pragma GCC unroll 4
                for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
                    for (int v = 0; v < vectors; ++v) taken[i][v] -= splat(sum[i]) * load(zeros + v * lanes);
                }
            }
            for (int i = 0; i < rows; ++i) {
                for (int v = 0; v < vectors; ++v) store(out + (r + i) * few_panel + c + v * lanes, taken[i][v]);
            }
        }
    }
}

#if defined(__AVX2__)

// Sums of one run, 6 rows of x by 16 of w: 12 vectors of 16-bit sums, two of w, a splat and a product fill the registers.
#define FEWBITS_QUAD_ROW(offset, low, high)                 \
    "vpbroadcastd " #offset "(%[x]), %%ymm14\n\t"           \
    "vpmaddubsw %%ymm14, %%ymm12, %%ymm15\n\t"              \
    "vpmaddubsw %%ymm14, %%ymm13, %%ymm14\n\t"              \
    "vpaddw %%ymm15, %%ymm" #low ", %%ymm" #low "\n\t"      \
    "vpaddw %%ymm14, %%ymm" #high ", %%ymm" #high "\n\t"
#define FEWBITS_FIRST_ROW(offset, low, high)                \
    "vpbroadcastd " #offset "(%[x]), %%ymm14\n\t"           \
    "vpmaddubsw %%ymm14, %%ymm12, %%ymm" #low "\n\t"        \
    "vpmaddubsw %%ymm14, %%ymm13, %%ymm" #high "\n\t"
#define FEWBITS_QUAD(o, row)                                \
    "vmovdqa " #o "(%[w]), %%ymm12\n\t"                     \
    "vmovdqa " #o "+32(%[w]), %%ymm13\n\t"                  \
    row(o+0, 0, 1) row(o+4, 2, 3) row(o+8, 4, 5) row(o+12, 6, 7) row(o+16, 8, 9) row(o+20, 10, 11)
// out += sum * (scale of w) * (scale of x)
#define FEWBITS_SCALED(i, of_w, r, o)                       \
    "vpmaddwd %[ones], %%ymm" #i ", %%ymm" #i "\n\t"        \
    "vcvtdq2ps %%ymm" #i ", %%ymm" #i "\n\t"                \
    "vmulps %%ymm" #of_w ", %%ymm" #i ", %%ymm" #i "\n\t"   \
    "vbroadcastss 4*" #r "(%[sx]), %%ymm14\n\t"             \
    "vfmadd213ps " #o "(%[out]), %%ymm14, %%ymm" #i "\n\t"  \
    "vmovaps %%ymm" #i ", " #o "(%[out])\n\t"

alignas(32) constexpr std::int16_t few_ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

inline void few_tile(const std::int32_t *x, const std::int32_t *w, const float *sx, const float *sw, float *out) {
    static_assert(few_panel == 48 && few_words == 8, "the offsets below are those of 48 rows and 8 words");
    __asm__ volatile(
        FEWBITS_QUAD(0, FEWBITS_FIRST_ROW) FEWBITS_QUAD(192, FEWBITS_QUAD_ROW) FEWBITS_QUAD(384, FEWBITS_QUAD_ROW)
        FEWBITS_QUAD(576, FEWBITS_QUAD_ROW) FEWBITS_QUAD(768, FEWBITS_QUAD_ROW) FEWBITS_QUAD(960, FEWBITS_QUAD_ROW)
        FEWBITS_QUAD(1152, FEWBITS_QUAD_ROW) FEWBITS_QUAD(1344, FEWBITS_QUAD_ROW)
        "vmovaps (%[sw]), %%ymm12\n\t"
        "vmovaps 32(%[sw]), %%ymm13\n\t"
        FEWBITS_SCALED(0, 12, 0, 0) FEWBITS_SCALED(1, 13, 0, 32)
        FEWBITS_SCALED(2, 12, 1, 192) FEWBITS_SCALED(3, 13, 1, 224)
        FEWBITS_SCALED(4, 12, 2, 384) FEWBITS_SCALED(5, 13, 2, 416)
        FEWBITS_SCALED(6, 12, 3, 576) FEWBITS_SCALED(7, 13, 3, 608)
        FEWBITS_SCALED(8, 12, 4, 768) FEWBITS_SCALED(9, 13, 4, 800)
        FEWBITS_SCALED(10, 12, 5, 960) FEWBITS_SCALED(11, 13, 5, 992)
        :
        : [x] "r"(x), [w] "r"(w), [sx] "r"(sx), [sw] "r"(sw), [out] "r"(out),
          [ones] "m"(*reinterpret_cast<const __m256i *>(few_ones))
        : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15");
}

constexpr int few_rows = 6, few_columns = 16;

#else

constexpr int few_rows = 6, few_columns = 8;

inline void few_tile(const std::int32_t *x, const std::int32_t *w, const float *sx, const float *sw, float *out) {
    std::int32_t sum[few_rows][few_columns] = {};
    for (int q = 0; q < few_words; ++q, x += few_panel, w += few_panel) {
        const auto *a = reinterpret_cast<const std::int8_t *>(x);
        const auto *b = reinterpret_cast<const std::uint8_t *>(w);
        for (int r = 0; r < few_rows; ++r) {
            for (int c = 0; c < few_columns; ++c) {
                for (int i = 0; i < 4; ++i) sum[r][c] += a[4 * r + i] * b[4 * c + i];
            }
        }
    }
    for (int r = 0; r < few_rows; ++r) {
        for (int c = 0; c < few_columns; ++c) out[r * few_panel + c] += static_cast<float>(sum[r][c]) * sw[c] * sx[r];
    }
}

#endif

void few_add(const void *packed, std::int64_t runs, std::int64_t per_group, float *sums) {
    const std::int32_t *x = static_cast<const std::int32_t *>(packed);
    for (std::int64_t run = 0; run < runs; ++run, x += few_step) {
        float *to = sums + run / per_group * few_panel;
        if (run % per_group == 0) std::memset(to, 0, few_panel * sizeof(float));
        for (int r = 0; r < few_panel; ++r) to[r] += floats_of(x)[few_panel + r];
    }
}

void few_multiply(const void *left, const float *sums, const void *right, std::int64_t runs, std::int64_t per_group,
                  float *out) {
    const std::int32_t *x = static_cast<const std::int32_t *>(left), *w = static_cast<const std::int32_t *>(right);
    few_zeros(sums, w, runs, per_group, out);
    for (std::int64_t run = 0; run < runs; ++run, x += few_step, w += few_step) {
        for (int c = 0; c < few_panel; c += few_columns) {
            for (int r = 0; r < few_panel; r += few_rows) {
                few_tile(x + r, w + c, floats_of(x) + r, floats_of(w) + c, out + r * few_panel + c);
            }
        }
    }
}

const FewKernels few_all = {few_pack, few_add, few_multiply};

}  // namespace
}  // namespace fewbits
