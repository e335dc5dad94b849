// The product for fixed-point activations: without AVX-512, turning every code into a float costs more than reading it, while
// VPMADDWD multiplies 16 codes at a time as they come out of their lanes.
#if defined(__x86_64__)
#define FEWBITS_W 8
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {
namespace {

// Codes of columns 2k and 2k+1 of a unit as int16, one row per lane; of columns k and k+2 of the bytes of an 8-bit unit.
template <int BITS>
FEWBITS_INLINE __m256i pair(const uint32_t* v, int k) {
    const auto at = [&](int i) { return _mm256_loadu_si256((const __m256i*)(v + i * kRows)); };
    if constexpr (BITS == 8) {
        return k % 2 ? _mm256_srli_epi16(at(0), 8) : _mm256_and_si256(at(0), _mm256_set1_epi16(255));
    } else if constexpr (BITS == 3) {
        const int s = 2 * (k % 8), bit = (s + 2 + k / 8) % 16;
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(at(k / 8), s), _mm256_set1_epi16(3));
        const __m256i top = bit >= 2 ? _mm256_srli_epi16(at(2), bit - 2) : _mm256_slli_epi16(at(2), 2 - bit);
        return _mm256_or_si256(low, _mm256_and_si256(top, _mm256_set1_epi16(4)));
    } else {
        const __m256i shifted = _mm256_srli_epi16(at(0), BITS * k);
        return BITS * (k + 1) == 16 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16((1 << BITS) - 1));
    }
}

// Units of one chunk, for N halves of a block: int32 sums [N][M][P] of P parts of x.
template <int BITS, int M, int P, int N>
FEWBITS_INLINE void dot_fixed(const uint32_t* codes, const uint32_t* const* x, int64_t units, __m256i* acc) {
    constexpr int U = unit_columns(BITS) / 2;
    for (int i = 0; i < N * M * P; i++) acc[i] = _mm256_setzero_si256();
    for (int64_t u = 0; u < units; u++) {
        __builtin_prefetch(codes + 1024);
#pragma GCC unroll 16
        for (int k = 0; k < U; k++) {
            __m256i q[N];
            for (int h = 0; h < N; h++) q[h] = pair<BITS>(codes + h * W, k);
#pragma GCC unroll 16
            for (int i = 0; i < M * P; i++) {
                const __m256i xs = _mm256_set1_epi32(int(x[i % P][(u * U + k) * M + i / P]));
                for (int h = 0; h < N; h++) {
                    __m256i& sum = acc[h * M * P + i];
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(q[h], xs));
                    __asm__("" : "+x"(sum));  // or GCC adds in an order that needs more registers than there are
                }
            }
        }
        codes += unit_vectors(BITS) * kRows;
    }
}

// One group: float32 sums [H][M] of its chunks, of all P parts of x together.
template <int BITS, int M, int P>
FEWBITS_INLINE void group_fixed(const Weight& w, int64_t g, const uint32_t* codes, const uint32_t* const* x, const float* steps, vf* sums) {
    constexpr int N = M * P <= 4 ? H : 1, U = unit_columns(BITS);
    constexpr int64_t most = kChunk / U;
    const uint32_t* at[P];
    for (int i = 0; i < P; i++) at[i] = x[i];
    for (int i = 0; i < H * M; i++) sums[i] = vf{};
    for (int64_t left = w.units_of(g); left > 0; left -= most, steps += M) {
        const int64_t units = left < most ? left : most;
        for (int h = 0; h < H; h += N) {
            __m256i acc[N * M * P];
            dot_fixed<BITS, M, P, N>(codes + h * W, at, units, acc);
#pragma GCC unroll 16
            for (int i = 0; i < N * M; i++) {
                vf v = (vf)_mm256_cvtepi32_ps(acc[i * P]);
                if (P == 2) v = fma((vf)_mm256_cvtepi32_ps(acc[i * P + P - 1]), splat(kLowStep), v);
                sums[h * M + i] = fma(v, splat(steps[i % M]), sums[h * M + i]);
            }
        }
        codes += units * unit_vectors(BITS) * kRows;
        for (int i = 0; i < P; i++) at[i] += units * U / 2 * M;
    }
}

template <int BITS, int M, int P>
void blocks_fixed(const Weight& w, const Product& p, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        const uint32_t* codes = w.codes + b * w.block_words();
        const uint32_t* x[2] = {(const uint32_t*)p.x, p.low};
        const float* steps = p.steps;
        vf total[H * M] = {};
        for (int64_t g = 0; g < w.groups; g++) {
            vf sums[H * M];
            if constexpr (M * P <= 8) {
                group_fixed<BITS, M, P>(w, g, codes, x, steps, sums);
            } else {  // 16 sums and their operands exceed the registers
                vf low[H * M];
                group_fixed<BITS, M, 1>(w, g, codes, x, steps, sums);
                group_fixed<BITS, M, 1>(w, g, codes, x + 1, steps, low);
                for (int i = 0; i < H * M; i++) sums[i] = fma(low[i], splat(kLowStep), sums[i]);
            }
            const int64_t units = w.units_of(g);
            codes += units * unit_vectors(BITS) * kRows;
            for (auto& part : x) part += units * unit_columns(BITS) / 2 * M;
            steps += w.chunks_of(g) * M;
            for (int h = 0; h < H; h++) {
                const int64_t at = (b * w.groups + g) * kRows + h * W;
                const vf s = load_scale(w, at), z = load_zero(w, at);
                for (int m = 0; m < M; m++) total[h * M + m] = fma(s, sums[h * M + m] - z * p.sums[g * M + m], total[h * M + m]);
            }
        }
        for (int m = 0; m < M; m++) {
            float sums[kRows];
            for (int h = 0; h < H; h++) store(sums + h * W, total[h * M + m]);
            emit(w, p, b, m, sums);
        }
    }
}

template <int BITS, int P>
void bits_fixed(const Weight& w, const Product& p, int64_t first, int64_t last) {
    static constexpr ProductFn by_batch[] = {blocks_fixed<BITS, 1, P>, blocks_fixed<BITS, 2, P>, blocks_fixed<BITS, 3, P>,
                                             blocks_fixed<BITS, 4, P>, blocks_fixed<BITS, 5, P>, blocks_fixed<BITS, 6, P>,
                                             blocks_fixed<BITS, 7, P>, blocks_fixed<BITS, 8, P>};
    by_batch[p.batch - 1](w, p, first, last);
}

template <int P>
void parts_fixed(const Weight& w, const Product& p, int64_t first, int64_t last) {
    if (w.bits == 4) bits_fixed<4, P>(w, p, first, last);
    else if (w.bits == 8) bits_fixed<8, P>(w, p, first, last);
    else if (w.bits == 2) bits_fixed<2, P>(w, p, first, last);
    else bits_fixed<3, P>(w, p, first, last);
}

void product_fixed(const Weight& w, const Product& p, int64_t first, int64_t last) {
    if (p.low) parts_fixed<2>(w, p, first, last);
    else parts_fixed<1>(w, p, first, last);
}

}  // namespace

Kernels avx2_kernels() { return {"avx2", product, nullptr, product_fixed, dequantize}; }

}  // namespace fewbits::qlinear
#endif
