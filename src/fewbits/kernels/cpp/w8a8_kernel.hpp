// The product, written once: a tile of up to kTile rows of x times two vectors of rows of the weight stays in registers over
// kDepth quads. Define FEWBITS_W (4, 8: AVX2, 16: AVX-512 VNNI) and include. Everything has internal linkage.
#include <cstring>

#include "w8a8.hpp"

#if FEWBITS_W > 4
#include <immintrin.h>
#endif

namespace fewbits::w8a8 {
namespace {

constexpr int W = FEWBITS_W;
constexpr int kTile = W == 4 ? 2 : 6;
constexpr int64_t kDepth = 128;  // quads: the weight's bytes of a call and a tile of x stay in the first two caches
typedef int32_t vi __attribute__((vector_size(W * 4)));

#define FEWBITS_INLINE inline __attribute__((always_inline))

FEWBITS_INLINE vi load(const void* p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}

FEWBITS_INLINE void store(void* p, vi v) { memcpy(p, &v, sizeof v); }

#if FEWBITS_W == 16
using Value = uint8_t;
FEWBITS_INLINE void step(const int8_t* w, const Value* x, vi& acc) {
    int32_t four;
    memcpy(&four, x, 4);
    acc = (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(four), (__m512i)load(w));
}
FEWBITS_INLINE vi begin(const int32_t* sums) { return load(sums) * -128; }  // x is 128 too large
#else
using Value = int16_t;
FEWBITS_INLINE vi begin(const int32_t*) { return vi{}; }
#endif

template <int M>
FEWBITS_INLINE void tile(const int8_t* w0, const int8_t* w1, const Value* x, int64_t quads, vi (&acc)[M][2]) {
    for (int64_t q = 0; q < quads; q++, w0 += kRows * 4, w1 += kRows * 4, x += kTile * 4) {
#if FEWBITS_W == 16
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            step(w0, x + m * 4, acc[m][0]);
            step(w1, x + m * 4, acc[m][1]);
        }
#elif FEWBITS_W == 8
        const __m256i a = (__m256i)load(w0), b = (__m256i)load(w1);
        const __m256i a0 = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a1 = _mm256_srai_epi16(a, 8);
        const __m256i b0 = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b1 = _mm256_srai_epi16(b, 8);
        const auto add = [](vi& sum, __m256i w, __m256i xs) {
            sum = (vi)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(w, xs));
            __asm__("" : "+x"(sum));  // or GCC adds in an order that needs more registers than there are
        };
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            int32_t even, odd;
            memcpy(&even, x + m * 4, 4);
            memcpy(&odd, x + m * 4 + 2, 4);
            const __m256i x0 = _mm256_set1_epi32(even), x1 = _mm256_set1_epi32(odd);
            add(acc[m][0], a0, x0);
            add(acc[m][1], b0, x0);
            add(acc[m][0], a1, x1);
            add(acc[m][1], b1, x1);
        }
#else
        const vi a = load(w0), b = load(w1);
        for (int m = 0; m < M; m++) {
            const Value* xs = x + m * 4;
            for (int j = 0; j < 4; j++) {
                const int32_t value = xs[(j & 1) * 2 + j / 2];
                const int left = 24 - 8 * j;
                acc[m][0] += ((a << left) >> 24) * value;
                acc[m][1] += ((b << left) >> 24) * value;
            }
        }
#endif
    }
}

// W rows of the weight from `row` on; rows beyond the last are dropped.
FEWBITS_INLINE void put(const Weight& w, int32_t* y, int64_t row, vi v) {
    if (row + W <= w.out) {
        store(y + row, v);
    } else if (row < w.out) {
        memcpy(y + row, &v, size_t(w.out - row) * 4);
    }
}

FEWBITS_INLINE vi get(const Weight& w, const int32_t* y, int64_t row) {
    if (row + W <= w.out) return load(y + row);
    vi v = {};
    if (row < w.out) memcpy(&v, y + row, size_t(w.out - row) * 4);
    return v;
}

template <int M>
void tile_at(const Weight& w, const Value* x, int32_t* y, int64_t row, int64_t from, int64_t count) {
    const int64_t block = row / kRows, quads = w.quads(), second = row + W;
    const int8_t* w0 = w.packed + (block * quads + from) * kRows * 4 + row % kRows * 4;
    // A second vector beyond the weight repeats the first; put drops it.
    const bool inside = second / kRows < w.blocks();
    const int8_t* w1 = inside ? w.packed + (second / kRows * quads + from) * kRows * 4 + second % kRows * 4 : w0;
    vi acc[M][2];
    for (int m = 0; m < M; m++) {
        int32_t* out = y + m * w.out;
        acc[m][0] = from ? get(w, out, row) : begin(w.sums + row);
        acc[m][1] = from ? get(w, out, second) : begin(w.sums + (inside ? second : row));
    }
    tile<M>(w0, w1, x + from * kTile * 4, count, acc);
    for (int m = 0; m < M; m++) {
        put(w, y + m * w.out, row, acc[m][0]);
        put(w, y + m * w.out, second, acc[m][1]);
    }
}

using TileFn = void (*)(const Weight&, const Value*, int32_t*, int64_t, int64_t, int64_t);

void product(const Weight& w, const Input& in, int64_t first, int64_t last) {
#if FEWBITS_W == 4
    static constexpr TileFn tiles[] = {tile_at<1>, tile_at<2>};
#else
    static constexpr TileFn tiles[] = {tile_at<1>, tile_at<2>, tile_at<3>, tile_at<4>, tile_at<5>, tile_at<6>};
#endif
    const int64_t quads = w.quads(), end = last * kRows < w.out ? last * kRows : w.out;
    for (int64_t from = 0; from < quads; from += kDepth) {
        const int64_t count = quads - from < kDepth ? quads - from : kDepth;
        for (int64_t t = 0; t < in.rows; t += kTile) {
            const int64_t m = in.rows - t < kTile ? in.rows - t : kTile;
            for (int64_t row = first * kRows; row < end; row += 2 * W) {
                tiles[m - 1](w, (const Value*)in.x + t * quads * 4, in.y + t * w.out, row, from, count);
            }
        }
    }
}

}  // namespace
}  // namespace fewbits::w8a8
