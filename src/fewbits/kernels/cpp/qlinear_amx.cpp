// (Compiled with the flags of the AMX level, which include AVX-512 BF16; no tile is used.)
// The product for bfloat16 activations with AVX-512 BF16: codes become bfloat16 exactly, through a table in a register, and
// VDPBF16PS multiplies pairs of columns with float32 sums.
#if defined(__x86_64__)
#define FEWBITS_W 16
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {
namespace {

// bfloat16(i mod 2**BITS): bits of the index above the code are ignored, which saves masking them off.
template <int BITS>
FEWBITS_INLINE __m512i code_table() {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; i++) table[i] = float_to_bf16(float(i & ((1 << BITS) - 1)));
    return _mm512_load_si512(table);
}

// Columns 2k and 2k+1 of a unit, as pairs of bfloat16.
template <int BITS>
FEWBITS_INLINE __m512i pair(const uint32_t* v, int k, __m512i table) {
    if constexpr (BITS == 3) {
        const __m512i a = _mm512_loadu_si512(v + (k / 8) * kRows), b = _mm512_loadu_si512(v + 2 * kRows);
        const int s = 2 * (k % 8), bit = (s + 2 + k / 8) % 16;
        const __m512i low = _mm512_srli_epi16(a, s);
        const __m512i top = bit >= 2 ? _mm512_srli_epi16(b, bit - 2) : _mm512_slli_epi16(b, 2 - bit);
        // 0xca selects low where the mask is set and top elsewhere.
        return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_set1_epi16(3), low, top, 0xca), table);
    } else {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_loadu_si512(v), BITS * k), table);
    }
}

template <int BITS, int M>
FEWBITS_INLINE void dot_bf16(const uint32_t* codes, const uint32_t* x, int64_t units, __m512i table, __m512* acc) {
    constexpr int U = unit_columns(BITS) / 2, N = M == 1 ? 4 : M <= 3 ? 2 : 1;
    __m512 part[N][M];
    for (int i = 0; i < N * M; i++) part[i / M][i % M] = _mm512_setzero_ps();
    for (int64_t u = 0; u < units; u++) {
        __builtin_prefetch(codes + 1024);
#pragma GCC unroll 16
        for (int k = 0; k < U; k++) {
            const __m512i q = pair<BITS>(codes, k, table);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const __m512i xs = _mm512_set1_epi32(int(x[k * M + m]));
                part[k % N][m] = _mm512_dpbf16_ps(part[k % N][m], (__m512bh)q, (__m512bh)xs);
            }
        }
        codes += unit_vectors(BITS) * kRows;
        x += U * M;
    }
    for (int m = 0; m < M; m++) {
        acc[m] = part[0][m];
        for (int n = 1; n < N; n++) acc[m] = _mm512_add_ps(acc[m], part[n][m]);
    }
}

template <int BITS, int M>
void product_blocks_bf16(const Weight& w, const Product& p, int64_t first, int64_t last) {
    const int64_t unit_words = unit_vectors(BITS) * kRows, full = w.units_of(0);
    const __m512i table = code_table<BITS>();
    for (int64_t b = first; b < last; b++) {
        const uint32_t* codes = w.codes + b * w.block_words();
        const uint32_t* x = (const uint32_t*)p.x;
        vf total[M] = {};
        for (int64_t g = 0; g < w.groups; g++) {
            const int64_t units = g + 1 < w.groups ? full : w.units_of(g), at = (b * w.groups + g) * kRows;
            __m512 acc[M];
            dot_bf16<BITS, M>(codes, x, units, table, acc);
            const vf s = load_scale(w, at), z = load_zero(w, at);
            for (int m = 0; m < M; m++) total[m] = fma(s, (vf)acc[m] - z * p.sums[g * M + m], total[m]);
            codes += units * unit_words;
            x += units * unit_columns(BITS) / 2 * M;
        }
        for (int m = 0; m < M; m++) {
            float sums[kRows];
            store(sums, total[m]);
            emit(w, p, b, m, sums);
        }
    }
}

template <int BITS>
void product_bits_bf16(const Weight& w, const Product& p, int64_t first, int64_t last) {
    static constexpr ProductFn by_batch[] = {product_blocks_bf16<BITS, 1>, product_blocks_bf16<BITS, 2>,
                                             product_blocks_bf16<BITS, 3>, product_blocks_bf16<BITS, 4>,
                                             product_blocks_bf16<BITS, 5>, product_blocks_bf16<BITS, 6>,
                                             product_blocks_bf16<BITS, 7>, product_blocks_bf16<BITS, 8>};
    by_batch[p.batch - 1](w, p, first, last);
}

void product_bf16(const Weight& w, const Product& p, int64_t first, int64_t last) {
    if (w.bits == 4) product_bits_bf16<4>(w, p, first, last);
    else if (w.bits == 2) product_bits_bf16<2>(w, p, first, last);
    else product_bits_bf16<3>(w, p, first, last);
}

}  // namespace

Kernels avx512_bf16_kernels() { return {"avx512_bf16", product, product_bf16, nullptr, dequantize}; }

}  // namespace fewbits::qlinear
#endif
