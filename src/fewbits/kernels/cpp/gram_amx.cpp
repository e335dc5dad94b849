// x^T x for bfloat16 on AMX tiles: TDPBF16PS multiplies pairs of bfloat16 exactly and adds in float32.
//
// Both operands want pairs of consecutive rows of x side by side. A packed panel holds, per 32 rows of x, two tiles
// for the left operand (tile row = column of x) and two for the right one (tile row = pair of rows); one is the
// transpose of the other in units of pairs.
#include <immintrin.h>

#include "gram.hpp"

namespace fewbits {
namespace {

constexpr int panel = 32;
constexpr int amx_depth = 512, tile_bytes = 1024, step_bytes = 4 * tile_bytes, steps = amx_depth / 32;

struct TileConfig {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t column_bytes[16];
    std::uint8_t rows[16];
};

void amx_enter(void *saved) {
    // Other libraries keep a configuration of their own in this thread and may not set it again.
    __asm__ volatile("sttilecfg %0" : "=m"(*static_cast<TileConfig *>(saved)));
    TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.column_bytes[i] = 64;
        config.rows[i] = 16;
    }
    // Written out since compilers may take the intrinsic to read 8 bytes only, and drop the stores above.
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

void amx_leave(const void *saved) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*static_cast<const TileConfig *>(saved)) : "memory");
}

inline __m512i load_row(const GramJob &job, std::int64_t row, std::int64_t column, __mmask32 wanted) {
    if (row >= job.rows) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(wanted, static_cast<const std::uint16_t *>(job.x) + row * job.stride + column);
}

// 16 x 16 transpose of 32-bit units, in four rounds of unpacking.
inline void transpose(const __m512i *in, __m512i *out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        out[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        out[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

void amx_pack(const GramJob &job, std::int64_t row, std::int64_t column, void *packed) {
    // Interleaves the low (high) 16 columns of two rows.
    alignas(64) std::uint16_t order[2][32];
    for (int i = 0; i < 16; ++i) {
        for (int half = 0; half < 2; ++half) {
            order[half][2 * i] = static_cast<std::uint16_t>(16 * half + i);
            order[half][2 * i + 1] = static_cast<std::uint16_t>(32 + 16 * half + i);
        }
    }
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    const std::int64_t left = job.columns - column;
    const __mmask32 wanted = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    char *out = static_cast<char *>(packed);
    for (int s = 0; s < steps; ++s, out += step_bytes) {
        __m512i pairs[2][16], turned[16];
        for (int p = 0; p < 16; ++p) {
            const __m512i even = load_row(job, row + 32 * s + 2 * p, column, wanted);
            const __m512i odd = load_row(job, row + 32 * s + 2 * p + 1, column, wanted);
            pairs[0][p] = _mm512_permutex2var_epi16(even, low, odd);
            pairs[1][p] = _mm512_permutex2var_epi16(even, high, odd);
        }
        for (int half = 0; half < 2; ++half) {
            transpose(pairs[half], turned);
            for (int i = 0; i < 16; ++i) {
                _mm512_store_si512(out + half * tile_bytes + 64 * i, turned[i]);
                _mm512_store_si512(out + (2 + half) * tile_bytes + 64 * i, pairs[half][i]);
            }
        }
    }
}

void amx_multiply(const void *left, const void *right, float *out) {
    const char *a = static_cast<const char *>(left), *b = static_cast<const char *>(right) + 2 * tile_bytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < steps; ++s, a += step_bytes, b += step_bytes) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + tile_bytes, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + tile_bytes, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, panel * 4);
    _tile_stored(1, out + 16, panel * 4);
    _tile_stored(2, out + 16 * panel, panel * 4);
    _tile_stored(3, out + 16 * panel + 16, panel * 4);
    // The tile intrinsics do not say that they touch memory.
    __asm__ volatile("" : : : "memory");
}

const GramKernels amx_kernels = {panel, amx_depth, steps * step_bytes, amx_pack, amx_multiply, amx_enter, amx_leave};

}  // namespace

const GramKernels &gram_amx() { return amx_kernels; }

}  // namespace fewbits
