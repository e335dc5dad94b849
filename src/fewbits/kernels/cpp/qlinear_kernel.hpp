// The product and the dequantization, written once in vector extensions of W lanes and compiled once per instruction set:
// define FEWBITS_W (4: any CPU; 8: AVX2, FMA, F16C; 16: AVX-512), FEWBITS_TABLES for tables and FP8 in place of integers, and include. Everything has internal linkage, because the same name compiled for two
// instruction sets must never be merged by the linker.
#include <cstring>

#include "qlinear.hpp"

#if FEWBITS_W > 4
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own "undefined" intrinsics
#endif
#include <immintrin.h>
#endif

namespace fewbits::qlinear {
namespace {

constexpr int W = FEWBITS_W;
constexpr int H = kRows / W;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

#define FEWBITS_INLINE inline __attribute__((always_inline))

template <class V>
FEWBITS_INLINE V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}

template <class V>
FEWBITS_INLINE void store(void* p, V v) {
    memcpy(p, &v, sizeof(V));
}

FEWBITS_INLINE vf fma(vf a, vf b, vf c) {
#if FEWBITS_W == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FEWBITS_W == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Adding x to zeros would be an addition, because -0 + 0 is not -0.
FEWBITS_INLINE vf splat(float x) { return x - vf{}; }

FEWBITS_INLINE float half_to_float(uint16_t h) {
    uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;  // rebiases the exponent; subnormals come out right
    memcpy(&bits, &f, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
    bits |= uint32_t(h & 0x8000) << 16;
    memcpy(&f, &bits, 4);
    return f;
}

FEWBITS_INLINE uint16_t float_to_half(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    const uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (a < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded significand in the low bits
        float t;
        memcpy(&t, &a, 4);
        t += 0.5f;
        uint32_t r;
        memcpy(&r, &t, 4);
        return uint16_t(sign | (r - 0x3f000000));
    }
    return uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}

FEWBITS_INLINE uint16_t float_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

FEWBITS_INLINE vf load_halves(const uint16_t* p) {
#if FEWBITS_W == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif FEWBITS_W == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v;
    for (int i = 0; i < W; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
}

#if FEWBITS_W == 8
// Bytes 0 to 3 of 32 floats, together again: v[i] has the floats of bytes 4 i to 4 i + 3 of each half.
FEWBITS_INLINE void floats_of(__m256i b0, __m256i b1, __m256i b2, __m256i b3, __m256* v) {
    const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
    const __m256i low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
    v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
    v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
    v[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23));
    v[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23));
}
#endif

FEWBITS_INLINE vf bytes_to_floats(const uint8_t* p) {
#if FEWBITS_W == 8  // GCC takes six instructions for this conversion
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<vb>(p), vi), vf);
#endif
}

FEWBITS_INLINE vf splat_half(uint16_t h) {
#if FEWBITS_W == 16
    return (vf)_mm512_cvtph_ps(_mm256_set1_epi16(short(h)));
#elif FEWBITS_W == 8
    return (vf)_mm256_cvtph_ps(_mm_set1_epi16(short(h)));
#else
    return splat(half_to_float(h));
#endif
}

// base + step * code of W rows. The product is exact, so it does not matter whether the addition is fused with it.
FEWBITS_INLINE vf nested(const uint8_t* codes, uint16_t base, uint16_t step) {
    return fma(bytes_to_floats(codes), splat_half(step), splat_half(base));
}

// Scales of W rows, from element `at` on.
FEWBITS_INLINE vf load_scale(const Weight& w, int64_t at) {
    if (w.scale_dtype == Dtype::nested) {
        const Nested& n = ((const Nested*)w.scale)[at / kRows];
        return nested(n.scale + at % kRows, n.scale_base, n.scale_step);
    }
    if (w.scale_dtype == Dtype::f16) return load_halves((const uint16_t*)w.scale + at);
    if (w.scale_dtype == Dtype::f32) return load<vf>((const float*)w.scale + at);
#if FEWBITS_W == 8  // GCC takes five instructions for this conversion
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)((const uint16_t*)w.scale + at))), 16);
#else
    return (vf)(__builtin_convertvector(load<vh>((const uint16_t*)w.scale + at), vu) << 16);
#endif
}

FEWBITS_INLINE vf load_zero(const Weight& w, int64_t at) {
    if (w.scale_dtype == Dtype::nested) {
        const Nested& n = ((const Nested*)w.scale)[at / kRows];
        return nested(w.zero + at, n.zero_base, n.zero_step);
    }
    return bytes_to_floats(w.zero + at);
}

// The table of a weight, in registers where it fits.
struct Lookup {
#if FEWBITS_W == 16
    vf all;
    explicit Lookup(const float* t) : all(t ? load<vf>(t) : vf{}) {}
    FEWBITS_INLINE vf operator()(vu code) const { return (vf)_mm512_permutexvar_ps((__m512i)code, (__m512)all); }
#elif FEWBITS_W == 8
    vf low, high;
    explicit Lookup(const float* t) : low(t ? load<vf>(t) : vf{}), high(t ? load<vf>(t + 8) : vf{}) {}
    FEWBITS_INLINE vf operator()(vu code) const {  // the permutation reads 3 bits, the selection the sign bit
        const __m256 a = _mm256_permutevar8x32_ps((__m256)low, (__m256i)code), b = _mm256_permutevar8x32_ps((__m256)high, (__m256i)code);
        return (vf)_mm256_blendv_ps(a, b, (__m256)(code << 28));
    }
#else
    const float* table;
    explicit Lookup(const float* t) : table(t) {}
    FEWBITS_INLINE vf operator()(vu code) const {
        vf v;
        for (int i = 0; i < W; i++) v[i] = table[code[i] & 15];
        return v;
    }
#endif
};

// What the code of column j of a unit stands for: an integer times 2**shift_of(j), a table's value, an FP8 number divided by
// gain_of(CODE)**2. v points at the unit's first vector.
template <int CODE>
FEWBITS_INLINE vf field(const uint32_t* v, int j, const Lookup& lookup) {
    if constexpr (CODE == kTable) {
        return lookup(load<vu>(v) >> (4 * (j / 2) + 16 * (j % 2)));
    } else if constexpr (CODE == kE4M3) {
        return (vf)(((vi)(load<vu>(v) << (24 - 8 * j)) >> 4) & int32_t(0x87f00000));
    } else if constexpr (CODE == kE5M2) {
        return (vf)(((vi)(load<vu>(v) << (24 - 8 * j)) >> 3) & int32_t(0x8fe00000));
    } else if constexpr (CODE == 8) {
        const vu a = load<vu>(v);
        return j == 3 ? __builtin_convertvector((vi)(a >> 24), vf) : __builtin_convertvector((vi)(a & (0xffu << (8 * j))), vf);
    } else if constexpr (CODE == 4) {
        const vu a = load<vu>(v);
        const int s = 4 * (j / 2) + 16 * (j % 2);
        return s == 28 ? __builtin_convertvector((vi)(a >> 28), vf) : __builtin_convertvector((vi)(a & (15u << s)), vf);
    } else if constexpr (CODE == 2) {
        const vu a = load<vu>(v);
        const int s = 2 * (j / 2) + 16 * (j % 2);
        return s == 30 ? __builtin_convertvector((vi)(a >> 30), vf) : __builtin_convertvector((vi)(a & (3u << s)), vf);
    } else {
        const vu a = load<vu>(v + (j / 16) * kRows), b = load<vu>(v + 2 * kRows);
        const int h = j % 2, k = (j % 16) / 2, s = 2 * k + 16 * h, bit = 16 * h + (2 * k + 2 + j / 16) % 16;
        const int to = s == 30 ? 2 : s + 2;
        const vu top = (to >= bit ? b << (to - bit) : b >> (bit - to)) & (1u << to);
        return __builtin_convertvector((vi)((s == 30 ? a >> 30 : a & (3u << s)) | top), vf);
    }
}

// So many units are read for one half of a block, then for the other: the lines of the cache that both share stay near.
constexpr int64_t kPiece = 32;

// Units of one group against M rows of activations, added to acc.
template <int CODE, int M>
FEWBITS_INLINE void dot(const uint32_t* codes, const float* x, int64_t units, const Lookup& lookup, vf* acc) {
    constexpr int U = unit_columns(CODE), N = M == 1 ? 4 : M <= 3 ? 2 : 1;  // N independent sums hide the latency
    vf part[N][M] = {};
    for (int64_t u = 0; u < units; u++) {
        __builtin_prefetch(codes + 1024);
#pragma GCC unroll 32
        for (int j = 0; j < U; j++) {
            const vf q = field<CODE>(codes, j, lookup);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) part[j % N][m] = fma(q, splat(x[j * M + m]), part[j % N][m]);
        }
        codes += unit_vectors(CODE) * kRows;
        x += U * M;
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[m] += part[n][m];
}

FEWBITS_INLINE void emit(const Weight& w, const Product& p, int64_t block, int m, const float* sums) {
    const int64_t row = block * kRows, n = w.out - row < kRows ? w.out - row : kRows;
    for (int64_t i = 0; i < n; i++) {
        const float v = sums[i] + (p.bias ? p.bias[row + i] : 0.0f);
        const int64_t at = m * w.out + row + i;
        if (p.y_dtype == Dtype::f32) ((float*)p.y)[at] = v;
        else if (p.y_dtype == Dtype::bf16) ((uint16_t*)p.y)[at] = float_to_bf16(v);
        else ((uint16_t*)p.y)[at] = float_to_half(v);
    }
}

template <int CODE, int M>
void product_blocks(const Weight& w, const Product& p, int64_t first, int64_t last) {
    const int64_t unit_words = unit_vectors(CODE) * kRows, full = w.units_of(0);
    const Lookup lookup(w.table);
    for (int64_t b = first; b < last; b++) {
        const uint32_t* codes = w.codes + b * w.block_words();
        const float* x = (const float*)p.x;
        vf total[H][M] = {};
        for (int64_t g = 0; g < w.groups; g++) {
            const int64_t units = g + 1 < w.groups ? full : w.units_of(g), at = (b * w.groups + g) * kRows;
            vf acc[H][M] = {};
            for (int64_t left = units; left > 0; left -= kPiece) {
                const int64_t some = left < kPiece ? left : kPiece;
                for (int h = 0; h < H; h++) dot<CODE, M>(codes + h * W, x, some, lookup, acc[h]);
                codes += some * unit_words;
                x += some * unit_columns(CODE) * M;
            }
            for (int h = 0; h < H; h++) {
                const vf s = load_scale(w, at + h * W) * gain_of(CODE);
                if constexpr (CODE <= 8) {
                    const vf z = load_zero(w, at + h * W);
                    for (int m = 0; m < M; m++) acc[h][m] -= z * p.sums[g * M + m];
                }
                for (int m = 0; m < M; m++) total[h][m] = fma(s, acc[h][m], total[h][m]);
            }
        }
        for (int m = 0; m < M; m++) {
            float sums[kRows];
            for (int h = 0; h < H; h++) store(sums + h * W, total[h][m]);
            emit(w, p, b, m, sums);
        }
    }
}

template <int CODE>
void product_bits(const Weight& w, const Product& p, int64_t first, int64_t last) {
    static constexpr ProductFn by_batch[] = {product_blocks<CODE, 1>, product_blocks<CODE, 2>, product_blocks<CODE, 3>,
                                             product_blocks<CODE, 4>, product_blocks<CODE, 5>, product_blocks<CODE, 6>,
                                             product_blocks<CODE, 7>, product_blocks<CODE, 8>};
    by_batch[p.batch - 1](w, p, first, last);
}

#if defined(FEWBITS_TABLES)
[[maybe_unused]] void product(const Weight& w, const Product& p, int64_t first, int64_t last) {
    if (w.code == kTable) product_bits<kTable>(w, p, first, last);
    else if (w.code == kE4M3) product_bits<kE4M3>(w, p, first, last);
    else product_bits<kE5M2>(w, p, first, last);
}
#else
[[maybe_unused]] void product(const Weight& w, const Product& p, int64_t first, int64_t last) {
    if (w.bits == 4) product_bits<4>(w, p, first, last);
    else if (w.bits == 8) product_bits<8>(w, p, first, last);
    else if (w.bits == 2) product_bits<2>(w, p, first, last);
    else product_bits<3>(w, p, first, last);
}
#endif

template <int CODE>
constexpr float unscale(int j) {
    if (CODE > 8) return gain_of(CODE) * gain_of(CODE);
    const int step = CODE == 8 ? 8 * j : (CODE == 3 ? 2 : CODE) * ((j % (CODE == 3 ? 16 : 32)) / 2) + 16 * (j % 2);
    const int top = CODE == 8 ? 24 : CODE == 4 ? 28 : 30;
    float f = 1.0f;
    for (int i = 0; step != top && i < step; i++) f *= 0.5f;
    return f;
}

// Values of one column in P blocks, 16 rows each, to consecutive places.
template <int P, class T>
FEWBITS_INLINE void put(T* out, const vf* v) {
#if defined(__AVX512BF16__)
    if constexpr (P == 2 && sizeof(T) == 2) {
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
        memcpy(out, &both, 64);
        return;
    }
#endif
    for (int i = 0; i < P * H; i++) {
        if constexpr (sizeof(T) == 4) {
            store(out + i * W, v[i]);
        } else {
            const vu u = (vu)v[i];
            store(out + i * W, __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, vh));
        }
    }
}

template <int CODE, int P, class T>
FEWBITS_INLINE void dequantize_blocks(const Weight& w, T* out, int64_t stride, int64_t block) {
    constexpr int U = unit_columns(CODE);
    const int64_t unit_words = unit_vectors(CODE) * kRows, block_words = w.block_words();
    const uint32_t* codes = w.codes + block * block_words;
    const Lookup lookup(w.table);
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t columns = w.columns_of(g);
        vf s[P * H], z[P * H];
        for (int i = 0; i < P * H; i++) {
            const int64_t at = ((block + i / H) * w.groups + g) * kRows + (i % H) * W;
            s[i] = load_scale(w, at);
            z[i] = vf{};
            if constexpr (CODE <= 8) z[i] -= load_zero(w, at);
        }
        for (int64_t c = 0; c < columns; c += U, codes += unit_words) {
            const int64_t count = columns - c < U ? columns - c : U, column = g * w.group + c;
#pragma GCC unroll 32
            for (int j = 0; j < U; j++) {
                if (j >= count) break;
                vf v[P * H];
                for (int i = 0; i < P * H; i++) {
                    // The code and its difference from the zero point are integers: exact, with or without contraction.
                    v[i] = fma(field<CODE>(codes + (i / H) * block_words + (i % H) * W, j, lookup), splat(unscale<CODE>(j)), z[i]) * s[i];
                }
                put<P>(out + (w.order ? w.order[column + j] : column + j) * stride, v);
            }
        }
    }
}

// Two blocks at a time, so that a cache line of bfloat16 is written once.
template <int CODE, class T>
void dequantize_bits(const Weight& w, const Tile& t, int64_t first, int64_t last) {
    T* out = (T*)t.out + (first - t.first) * kRows;
    for (; first + 2 <= last; first += 2, out += 2 * kRows) dequantize_blocks<CODE, 2>(w, out, t.stride, first);
    if (first < last) dequantize_blocks<CODE, 1>(w, out, t.stride, first);
}

#if defined(FEWBITS_TABLES)
template <class T>
void dequantize_to(const Weight& w, const Tile& t, int64_t first, int64_t last) {
    if (w.code == kTable) dequantize_bits<kTable, T>(w, t, first, last);
    else if (w.code == kE4M3) dequantize_bits<kE4M3, T>(w, t, first, last);
    else dequantize_bits<kE5M2, T>(w, t, first, last);
}
#else
template <class T>
void dequantize_to(const Weight& w, const Tile& t, int64_t first, int64_t last) {
    if (w.bits == 4) dequantize_bits<4, T>(w, t, first, last);
    else if (w.bits == 8) dequantize_bits<8, T>(w, t, first, last);
    else if (w.bits == 2) dequantize_bits<2, T>(w, t, first, last);
    else dequantize_bits<3, T>(w, t, first, last);
}
#endif

[[maybe_unused]] void dequantize(const Weight& w, const Tile& t, int64_t first, int64_t last) {
    if (t.dtype == Dtype::f32) dequantize_to<float>(w, t, first, last);
    else dequantize_to<uint16_t>(w, t, first, last);
}

}  // namespace
}  // namespace fewbits::qlinear
