// A table of each row on AVX2, where permuting floats costs too much; VPSHUFB looks bytes up for 32 codes at a time:
// - product_wide: the table becomes 16-bit numbers, and VPMADDWD multiplies them with fixed-point x.
// - quads: float32, for up to kQuads rows: 34 operations for 64 codes, none of which crosses lanes.
#if defined(__x86_64__)
#define FEWBITS_W 8
#include "qlinear_rows_kernel.hpp"

namespace fewbits::qlinear {
namespace {

// A row's table as value * step, both bytes of each value.
struct WideTable {
    __m256i low, high;
    float step;

    FEWBITS_INLINE explicit WideTable(const uint16_t* halves) {
        const __m256 a = (__m256)load_halves(halves), b = (__m256)load_halves(halves + 8);
        const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_max_ps(_mm256_max_ps(a, b), _mm256_sub_ps(_mm256_setzero_ps(), _mm256_min_ps(a, b))));
        __m128 most = _mm_max_ps(_mm256_castps256_ps128(size), _mm256_extractf128_ps(size, 1));
        most = _mm_max_ps(most, _mm_movehl_ps(most, most));
        most = _mm_max_ss(most, _mm_movehdup_ps(most));
        const float top = _mm_cvtss_f32(most);
        step = top > 0.0f ? top / kWide : 1.0f;
        const __m256 by = _mm256_set1_ps(1.0f / step);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(a, by)), _mm256_cvtps_epi32(_mm256_mul_ps(b, by))), 0xd8);
        const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)), _mm256_srli_epi16(words, 8));
        low = _mm256_permute4x64_epi64(bytes, 0x88), high = _mm256_permute4x64_epi64(bytes, 0xdd);  // of values 0-7 and 8-15
    }
};

// 4 * kWide * (2**14 - 1) < 2**31: two products of pairs are added as integers.
template <int M>
void wide_blocks(const Weight& w, const Product& p, int64_t first, int64_t last) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const auto* tables = (const uint16_t*)w.scale;
    const int64_t units = w.units();
    const uint32_t* codes = w.codes + first * w.block_words();
    for (int64_t b = first; b < last; b++) {
        float sums[M][kRows];
        for (int r = 0; r < kRows; r++) {
            const WideTable table(tables + (b * kRows + r) * kRows);
            const auto* x = (const __m256i*)p.x;
            const float* steps = p.steps;
            __m256 acc[M][4];
            for (auto& row : acc)
                for (auto& a : row) a = _mm256_setzero_ps();
            for (int64_t u = 0; u < units; u++, x += 8 * M, steps += M) {
                __builtin_prefetch(codes + 1024);
#pragma GCC unroll 2
                for (int h = 0; h < H; h++, codes += W) {
                    const __m256i word = _mm256_loadu_si256((const __m256i*)codes);
                    const __m256i even = _mm256_and_si256(word, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble);
                    const __m256i le = _mm256_shuffle_epi8(table.low, even), he = _mm256_shuffle_epi8(table.high, even);
                    const __m256i lo = _mm256_shuffle_epi8(table.low, odd), ho = _mm256_shuffle_epi8(table.high, odd);
                    const __m256i q[4] = {_mm256_unpacklo_epi8(le, he), _mm256_unpackhi_epi8(le, he), _mm256_unpacklo_epi8(lo, ho), _mm256_unpackhi_epi8(lo, ho)};
#pragma GCC unroll 4
                    for (int m = 0; m < M; m++) {
                        __m256i products[4];
                        for (int i = 0; i < 4; i++) products[i] = _mm256_madd_epi16(q[i], _mm256_loadu_si256(x + m * 8 + h * 4 + i));
                        const __m256 step = _mm256_set1_ps(steps[m]);
                        for (int i = 0; i < 2; i++) {
                            const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(products[2 * i], products[2 * i + 1]));
                            acc[m][2 * h + i] = _mm256_fmadd_ps(sum, step, acc[m][2 * h + i]);
                        }
                    }
                }
            }
            for (int m = 0; m < M; m++) sums[m][r] = total_of((vf)((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]))) * table.step;
        }
        for (int m = 0; m < M; m++) emit(w, p, b, m, sums[m]);
    }
}

// A row's table as float32: bytes 1 to 3 of each value, in both halves. Float16 leaves byte 0 empty.
struct ByteTable {
    __m256i bytes[3];

    FEWBITS_INLINE explicit ByteTable(const uint16_t* halves) {
        const __m256i a = (__m256i)load_halves(halves), b = (__m256i)load_halves(halves + 8), byte = _mm256_set1_epi32(255);
        for (int i = 0; i < 3; i++) {
            const __m256i x = _mm256_and_si256(_mm256_srli_epi32(a, 8 * i + 8), byte), y = _mm256_and_si256(_mm256_srli_epi32(b, 8 * i + 8), byte);
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, y), 0xd8);
            bytes[i] = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x88);
        }
    }

    // Four bytes of each of eight lanes: v[i] has the values of lane i, then of lane i + 4.
    FEWBITS_INLINE void operator()(__m256i index, __m256* v) const {
        const __m256i b1 = _mm256_shuffle_epi8(bytes[0], index), b2 = _mm256_shuffle_epi8(bytes[1], index);
        const __m256i b3 = _mm256_shuffle_epi8(bytes[2], index), none = _mm256_setzero_si256();
        floats_of(none, b1, b2, b3, v);
    }
};

template <int M>
void quad_blocks(const Weight& w, const Product& p, int64_t first, int64_t last) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const auto* tables = (const uint16_t*)w.scale;
    const int64_t units = w.units();
    const uint32_t* codes = w.codes + first * w.block_words();
    for (int64_t b = first; b < last; b++) {
        float sums[M][kRows];
        for (int r = 0; r < kRows; r++) {
            const ByteTable table(tables + (b * kRows + r) * kRows);
            const float* x = (const float*)p.x;
            __m256 acc[M][4];
            for (auto& row : acc)
                for (auto& a : row) a = _mm256_setzero_ps();
            for (int64_t u = 0; u < units; u++, x += kRowUnit * M) {
                __builtin_prefetch(codes + 1024);
#pragma GCC unroll 2
                for (int h = 0; h < H; h++, codes += W) {
                    const __m256i word = _mm256_loadu_si256((const __m256i*)codes);
#pragma GCC unroll 2
                    for (int odd = 0; odd < 2; odd++) {
                        __m256 v[4];
                        table(_mm256_and_si256(odd ? _mm256_srli_epi16(word, 4) : word, nibble), v);
#pragma GCC unroll 2
                        for (int m = 0; m < M; m++)
                            for (int i = 0; i < 4; i++)
                                acc[m][i] = _mm256_fmadd_ps(v[i], _mm256_loadu_ps(x + m * kRowUnit + ((h * 2 + odd) * 4 + i) * W), acc[m][i]);
                    }
                }
            }
            for (int m = 0; m < M; m++) sums[m][r] = total_of((vf)((acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3])));
        }
        for (int m = 0; m < M; m++) emit(w, p, b, m, sums[m]);
    }
}

constexpr int kFew = 4, kQuads = 2;

void product_or_quads(const Weight& w, const Product& p, int64_t first, int64_t last) {
    if (p.batch > kQuads) product_row_table(w, p, first, last);
    else if (p.batch == 1) quad_blocks<1>(w, p, first, last);
    else quad_blocks<2>(w, p, first, last);
}

void product_wide(const Weight& w, const Product& p, int64_t first, int64_t last) {
    static constexpr ProductFn by_batch[kFew] = {wide_blocks<1>, wide_blocks<2>, wide_blocks<3>, wide_blocks<4>};
    by_batch[p.batch - 1](w, p, first, last);
}

}  // namespace

Kernels avx2_row_table_kernels() { return {"avx2", product_or_quads, nullptr, nullptr, dequantize_row_table, kQuads, nullptr, product_wide, kFew}; }

}  // namespace fewbits::qlinear
#endif
