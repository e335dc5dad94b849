// Tables and FP8 with AVX2. For one or two rows a table's float32 values are assembled from four lookups of bytes: that is half
// of the work of looking whole values up, which takes two permutations and a selection for every eight.
#if defined(__x86_64__)
#define FEWBITS_W 8
#define FEWBITS_TABLES
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {
namespace {

// Byte i of the 16 values, in both halves.
FEWBITS_INLINE __m256i bytes_of(const float* table, int i) {
    alignas(16) uint8_t bytes[16];
    for (int k = 0; k < 16; k++) memcpy(bytes + k, (const char*)(table + k) + i, 1);
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes));
}

// Four columns of eight rows: v[i] has rows i and i + 4, a column per lane.
FEWBITS_INLINE void quads(__m256i index, const __m256i* table, __m256* v) {
    const __m256i b0 = _mm256_shuffle_epi8(table[0], index), b1 = _mm256_shuffle_epi8(table[1], index);
    const __m256i b2 = _mm256_shuffle_epi8(table[2], index), b3 = _mm256_shuffle_epi8(table[3], index);
    const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
    const __m256i low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
    v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
    v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
    v[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23));
    v[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23));
}

template <int M>
FEWBITS_INLINE void dot_quads(const uint32_t* codes, const float* x, int64_t units, const __m256i* table, __m256* sums) {
    __m256 acc[M][4];
    for (int m = 0; m < M; m++)
        for (auto& a : acc[m]) a = _mm256_setzero_ps();
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t u = 0; u < units; u++, codes += kRows) {
        __builtin_prefetch(codes + 1024);
        const __m256i a = _mm256_loadu_si256((const __m256i*)codes);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256 v[4];
            quads(_mm256_and_si256(half ? _mm256_srli_epi16(a, 4) : a, nibble), table, v);
            for (int m = 0; m < M; m++, x += 4) {
                const __m256 xs = _mm256_broadcast_ps((const __m128*)x);
                for (int i = 0; i < 4; i++) acc[m][i] = _mm256_fmadd_ps(v[i], xs, acc[m][i]);
            }
        }
    }
    for (int m = 0; m < M; m++) {  // sums of four lanes: rows 0 to 3 and 4 to 7
        sums[m] = _mm256_hadd_ps(_mm256_hadd_ps(acc[m][0], acc[m][1]), _mm256_hadd_ps(acc[m][2], acc[m][3]));
    }
}

template <int M>
void blocks_quads(const Weight& w, const Product& p, int64_t first, int64_t last) {
    __m256i table[4];
    for (int i = 0; i < 4; i++) table[i] = bytes_of(w.table, i);
    for (int64_t b = first; b < last; b++) {
        const uint32_t* codes = w.codes + b * w.block_words();
        const float* x = (const float*)p.x;
        vf total[H][M] = {};
        for (int64_t g = 0; g < w.groups; g++) {
            const int64_t units = w.units_of(g), at = (b * w.groups + g) * kRows;
            for (int h = 0; h < H; h++) {
                __m256 sums[M];
                dot_quads<M>(codes + h * W, x, units, table, sums);
                const vf s = load_scale(w, at + h * W);
                for (int m = 0; m < M; m++) total[h][m] = fma(s, (vf)sums[m], total[h][m]);
            }
            codes += units * kRows;
            x += units * 8 * M;
        }
        for (int m = 0; m < M; m++) {
            float sums[kRows];
            for (int h = 0; h < H; h++) store(sums + h * W, total[h][m]);
            emit(w, p, b, m, sums);
        }
    }
}

void product_or_quads(const Weight& w, const Product& p, int64_t first, int64_t last) {
    if (w.code != kTable || p.batch > 2) product(w, p, first, last);
    else if (p.batch == 1) blocks_quads<1>(w, p, first, last);
    else blocks_quads<2>(w, p, first, last);
}

}  // namespace

Kernels avx2_table_kernels() { return {"avx2", product_or_quads, nullptr, nullptr, dequantize, 2}; }

}  // namespace fewbits::qlinear
#endif
