// Tables and FP8 with AVX2, where a permutation looks 32 bytes up in a table of 16, but 32-bit values only 8 at a time and in two
// halves. So few rows are multiplied by tables of integers (IntTable) and fixed-point x:
//
// - product_small, bytes by bytes: a lookup gives 32 weights. VPMADDUBSW multiplies them by the high and by the low bytes of x;
//   two units (16 columns) are summed in 16 bits. 14 operations for 64 codes, as many as 4-bit integers take; exact.
// - product_wide, 16 bits by 16 bits: two lookups give the low and the high bytes of 32 weights, and their interleaving is free of
//   cross-lane moves. 21 operations for 64 codes. A weight is off by at most 2**-16 of the table's largest value; only 16-bit x,
//   whose own rounding is 2**-9 or 2**-11, comes here.
// - quads, float32 from four lookups of bytes: 35 operations for 64 codes.
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
    floats_of(b0, b1, b2, b3, v);
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

// U units (at most 2) of half a block, whose codes are in `codes`: adds P parts of M rows to acc [M][P], a lane for each row of
// the weight.
template <int M, int P, int U>
FEWBITS_INLINE void small_units(const uint32_t* codes, const uint32_t* const* x, __m256i table, __m256i* acc) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i t[2 * U];
#pragma GCC unroll 2
    for (int u = 0; u < U; u++) {
        const __m256i a = _mm256_loadu_si256((const __m256i*)(codes + u * kRows));
        t[2 * u] = _mm256_shuffle_epi8(table, _mm256_and_si256(a, nibble));
        t[2 * u + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble));
    }
#pragma GCC unroll 8
    for (int i = 0; i < M * P; i++) {
        const uint32_t* at = x[i % P] + i / P * 4;
        const auto products = [&](int byte, int j) {
            return _mm256_maddubs_epi16(t[j], _mm256_set1_epi32(int(at[j / 2 * M * 4 + j % 2 + byte])));
        };
        __m256i high = products(0, 0), low = products(2, 0);
#pragma GCC unroll 3
        for (int j = 1; j < 2 * U; j++) {
            high = _mm256_add_epi16(high, products(0, j));
            low = _mm256_add_epi16(low, products(2, j));
        }
        const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)), _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        acc[i] = _mm256_add_epi32(acc[i], sum);
    }
}

// What a span needs of its chunks: chunk `c` has units_of(c) units and belongs to group_of(c).
struct Chunks {
    int64_t per_group, last_group, full, last, count;

    explicit Chunks(const Weight& w)
        : per_group(w.chunks_of(0)), last_group(w.groups - 1), full(w.units_of(0)), last(w.units_of(w.groups - 1)), count(w.chunks()) {}

    FEWBITS_INLINE int64_t group_of(int64_t c) const { return per_group == 1 ? c : c / per_group; }
    FEWBITS_INLINE int64_t units_of(int64_t c, int64_t g) const {
        const int64_t left = (g == last_group ? last : full) - (c - g * per_group) * (kChunk / 8);
        return left < kChunk / 8 ? left : kChunk / 8;
    }
};

// The rows of a block, summed over spans: part(span's first chunk, its end, sums [H][M] to fill).
template <int M, class Part>
FEWBITS_INLINE void block_by_spans(const Weight& w, const Product& p, const Chunks& chunks, int64_t block, const Part& part) {
    const int64_t span = w.span();
    const float* steps = p.steps;
    vf total[H][M] = {};
    for (int64_t c = 0; c < chunks.count; c += span, steps += M) {
        vf sums[H][M] = {};
        part(c, c + span < chunks.count ? c + span : chunks.count, sums);
        for (int h = 0; h < H; h++)
            for (int m = 0; m < M; m++) total[h][m] = fma(sums[h][m], splat(steps[m]), total[h][m]);
    }
    for (int m = 0; m < M; m++) {
        float sums[kRows];
        for (int h = 0; h < H; h++) store(sums + h * W, total[h][m]);
        emit(w, p, block, m, sums);
    }
}

// UNITS of every chunk where they are known, else 0.
template <int M, int P, int UNITS>
void blocks_small(const Weight& w, const Product& p, int64_t first, int64_t last) {
    alignas(16) uint8_t bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = uint8_t(w.ints.value[i] + w.ints.offset);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes));
    const Chunks chunks(w);
    for (int64_t b = first; b < last; b++) {
        const uint32_t* codes = w.codes + b * w.block_words();
        const uint32_t* x[2] = {(const uint32_t*)p.x, p.low};
        const int32_t* start[2] = {p.start, p.low_start};
        block_by_spans<M>(w, p, chunks, b, [&](int64_t c, int64_t end, vf(&sums)[H][M]) {
            for (; c < end; c++) {
                const int64_t g = UNITS ? c : chunks.group_of(c), units = UNITS ? UNITS : chunks.units_of(c, g);
                __m256i acc[H][M * P];
                for (int i = 0; i < M * P; i++) acc[0][i] = acc[1][i] = _mm256_set1_epi32(start[i % P][i / P]);
                int64_t u = 0;
#pragma GCC unroll 2
                for (; u + 2 <= units; u += 2) {
                    __builtin_prefetch(codes + 1024);
                    __builtin_prefetch(codes + 1024 + kRows);
                    for (int h = 0; h < H; h++) small_units<M, P, 2>(codes + h * W, x, table, acc[h]);
                    codes += 2 * kRows;
                    for (int i = 0; i < P; i++) x[i] += 2 * M * 4;
                }
                if (u < units) {
                    for (int h = 0; h < H; h++) small_units<M, P, 1>(codes + h * W, x, table, acc[h]);
                    codes += kRows;
                    for (int i = 0; i < P; i++) x[i] += M * 4;
                }
                for (int i = 0; i < P; i++) start[i] += M;
                for (int h = 0; h < H; h++) {
                    const vf s = load_scale(w, (b * w.groups + g) * kRows + h * W);
                    for (int m = 0; m < M; m++) {
                        vf v = (vf)_mm256_cvtepi32_ps(acc[h][m * P]);
                        if (P == 2) v = fma((vf)_mm256_cvtepi32_ps(acc[h][m * P + P - 1]), splat(kLowStep), v);
                        sums[h][m] = fma(s, v, sums[h][m]);
                    }
                }
            }
        });
    }
}

template <int M, int P>
void small_by_units(const Weight& w, const Product& p, int64_t first, int64_t last) {
    const bool even = w.group < kChunk && w.in % w.group == 0;
    if (even && w.group == 16) blocks_small<M, P, 2>(w, p, first, last);
    else if (even && w.group == 32) blocks_small<M, P, 4>(w, p, first, last);
    else blocks_small<M, P, 0>(w, p, first, last);
}

// One unit of half a block: adds to acc [M][2], float32, two lanes for each row of the weight: rows 0, 1, 4, 5, and 2, 3, 6, 7.
// 4 * kWide * (2**14 - 1) < 2**31.
template <int M>
FEWBITS_INLINE void wide_unit(const uint32_t* codes, const int64_t* x, __m256i low, __m256i high, __m256* acc) {
    const __m256i nibble = _mm256_set1_epi8(15), codes8 = _mm256_loadu_si256((const __m256i*)codes);
    const __m256i a = _mm256_and_si256(codes8, nibble), b = _mm256_and_si256(_mm256_srli_epi16(codes8, 4), nibble);
    const __m256i la = _mm256_shuffle_epi8(low, a), ha = _mm256_shuffle_epi8(high, a);
    const __m256i lb = _mm256_shuffle_epi8(low, b), hb = _mm256_shuffle_epi8(high, b);
    const __m256i a0 = _mm256_unpacklo_epi8(la, ha), a1 = _mm256_unpackhi_epi8(la, ha);
    const __m256i b0 = _mm256_unpacklo_epi8(lb, hb), b1 = _mm256_unpackhi_epi8(lb, hb);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        const __m256i xa = _mm256_set1_epi64x(x[2 * m]), xb = _mm256_set1_epi64x(x[2 * m + 1]);
        const __m256i s0 = _mm256_add_epi32(_mm256_madd_epi16(a0, xa), _mm256_madd_epi16(b0, xb));
        const __m256i s1 = _mm256_add_epi32(_mm256_madd_epi16(a1, xa), _mm256_madd_epi16(b1, xb));
        acc[2 * m] = _mm256_add_ps(acc[2 * m], _mm256_cvtepi32_ps(s0));
        acc[2 * m + 1] = _mm256_add_ps(acc[2 * m + 1], _mm256_cvtepi32_ps(s1));
    }
}

template <int M>
void blocks_wide(const Weight& w, const Product& p, int64_t first, int64_t last) {
    alignas(16) uint8_t bytes[2][16];
    for (int i = 0; i < 16; i++) {
        bytes[0][i] = uint8_t(w.ints.value[i]);
        bytes[1][i] = uint8_t(w.ints.value[i] >> 8);
    }
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[0]));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[1]));
    const Chunks chunks(w);
    for (int64_t b = first; b < last; b++) {
        const uint32_t* codes = w.codes + b * w.block_words();
        const int64_t* x = (const int64_t*)p.x;
        block_by_spans<M>(w, p, chunks, b, [&](int64_t c, int64_t end, vf(&sums)[H][M]) {
            for (; c < end; c++) {
                const int64_t g = chunks.group_of(c), units = chunks.units_of(c, g);
                __m256 acc[H][2 * M];
                for (auto& half : acc)
                    for (auto& a : half) a = _mm256_setzero_ps();
                for (int64_t u = 0; u < units; u++, codes += kRows, x += M * 2) {
                    __builtin_prefetch(codes + 1024);
                    for (int h = 0; h < H; h++) wide_unit<M>(codes + h * W, x, low, high, acc[h]);
                }
                for (int h = 0; h < H; h++) {
                    const vf s = load_scale(w, (b * w.groups + g) * kRows + h * W);
                    for (int m = 0; m < M; m++) sums[h][m] = fma(s, (vf)_mm256_hadd_ps(acc[h][2 * m], acc[h][2 * m + 1]), sums[h][m]);
                }
            }
        });
    }
}

constexpr int kFew = 4;

void product_small(const Weight& w, const Product& p, int64_t first, int64_t last) {
    static constexpr ProductFn by_batch[2][kFew] = {{small_by_units<1, 1>, small_by_units<2, 1>, small_by_units<3, 1>, small_by_units<4, 1>},
                                                    {small_by_units<1, 2>, small_by_units<2, 2>, small_by_units<3, 2>, small_by_units<4, 2>}};
    by_batch[p.low != nullptr][p.batch - 1](w, p, first, last);
}

void product_wide(const Weight& w, const Product& p, int64_t first, int64_t last) {
    static constexpr ProductFn by_batch[kFew] = {blocks_wide<1>, blocks_wide<2>, blocks_wide<3>, blocks_wide<4>};
    by_batch[p.batch - 1](w, p, first, last);
}

void product_or_quads(const Weight& w, const Product& p, int64_t first, int64_t last) {
    if (w.code != kTable || p.batch > 2) product(w, p, first, last);
    else if (p.batch == 1) blocks_quads<1>(w, p, first, last);
    else blocks_quads<2>(w, p, first, last);
}

}  // namespace

Kernels avx2_table_kernels() { return {"avx2", product_or_quads, nullptr, nullptr, dequantize, 2, product_small, product_wide, kFew}; }

}  // namespace fewbits::qlinear
#endif
