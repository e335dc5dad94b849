// Weight-only linear layers on uniform integer grids: what the prepacked weight looks like, and the functions that every
// instruction set provides for it.
//
// Layout. Rows are taken 16 at a time (a *block*); one 32-bit lane belongs to one row, so that no instruction ever moves data
// between rows. Inside a block the columns run group by group; a group is padded to whole *units*:
//
//   bits  columns of a unit  vectors of 16 x uint32   place of column j in its lane
//    8            4                   1               byte j
//    4            8                   1               shift 4*(j/2) + 16*(j%2)
//    2           16                   1               shift 2*(j/2) + 16*(j%2)
//    3           32                   3               two vectors of 2-bit fields as above (columns 0-15, 16-31), one of top bits
//
// Even columns lie in the low half of the lane and odd ones in the high half, because a pair of bfloat16 activations has that
// order. The top bit of a 3-bit code in 16-bit half h, field shift s of vector v lies at bit 16*h + (s + 2 + v) % 16.
// Scales (float32, float16 or bfloat16) and zero points (uint8) are stored [block][group][16 rows]. Nested scales (see Nested) are
// uint8 codes, and so are the zero points then.
//
// A table for each row (kRowTable) is the exception, because an instruction looks up in one table: a lane holds 8 codes of one row. A
// block is its 16 rows one after the other; a row consists of units of 16 lanes, and lane i of a unit has columns i, 16 + i, 32 + i,
// ... 112 + i of it, from the lowest bits on. Tables are float16 [block][16 rows][16 values].
#pragma once

#include <cstdint>

namespace fewbits::qlinear {

constexpr int kRows = 16;
constexpr int kMaxBatch = 8;

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2, nested = 3 };

// What a code means: an integer of as many bits (2, 3, 4, 8), an entry of a table of 16 values, or of the row's own table, a finite
// FP8 number.
constexpr int kTable = 20, kRowTable = 21, kE4M3 = 40, kE5M2 = 41;
constexpr int bits_of(int code) { return code == kTable || code == kRowTable ? 4 : code >= kE4M3 ? 8 : code; }
constexpr int kRowUnit = 128;  // columns of a unit of kRowTable
constexpr int unit_columns(int code) { return code == kRowTable ? kRowUnit : bits_of(code) == 8 ? 4 : bits_of(code) == 4 ? 8 : code == 2 ? 16 : 32; }
constexpr int unit_vectors(int code) { return code == 3 ? 3 : code == kRowTable ? kRows : 1; }

// The bits of an FP8 number, put where a float32 has its own, are a float32 too small by this power of two; half of it is
// taken from the activations and half from the scale, so that no product leaves the range.
constexpr float gain_of(int code) { return code == kE4M3 ? 0x1p60f : code == kE5M2 ? 0x1p56f : 1.0f; }

// Fixed-point activations share a power of two per chunk of at most 128 columns; a group has whole chunks but for its last one.
// 128 * 255 * 32768 < 2^31: sums of a chunk are exact in 32 bits.
constexpr int kChunk = 128;
constexpr float kLowStep = 1.0f / (1 << 15);  // of a low part, in steps of the high part

// A table in whole numbers: table[i] is value[i] * step up to half a step. A small table is these numbers exactly (E2M1 in halves,
// ternary), and with an offset they are bytes: four products of two of them by bytes of x, 4 * 2 * kSmall * 128, fit 16 bits.
constexpr int kSmall = 31, kWide = 32767;

struct IntTable {
    int16_t value[16];
    float step;
    int offset;  // of a small table: value + offset is in 0..kSmall
    bool small;
};

IntTable int_table(const float* table);  // see qlinear_prepare.cpp

// Scales and zero points of one group of a block: base + step * code (SpQR). bases and steps are float16.
struct Nested {
    uint8_t scale[kRows];
    uint16_t scale_base, scale_step, zero_base, zero_step;
};

struct Weight {
    const uint32_t* codes;
    const void* scale;
    const uint8_t* zero;
    const int32_t* order;  // column of x at each packed column when they differ, else null
    const float* table;    // [16] for kTable
    Dtype scale_dtype;
    int code;  // see above
    int bits;  // of a code in its lane
    int64_t out, in;
    int64_t group;   // columns of a full group
    int64_t groups;  // the last one may be shorter
    IntTable ints;   // of table

    int64_t blocks() const { return (out + kRows - 1) / kRows; }
    int64_t columns_of(int64_t g) const { return g + 1 < groups ? group : in - group * (groups - 1); }
    int64_t units_of(int64_t g) const { return (columns_of(g) + unit_columns(code) - 1) / unit_columns(code); }
    int64_t units() const { return (groups - 1) * units_of(0) + units_of(groups - 1); }
    int64_t padded() const { return units() * unit_columns(code); }
    int64_t block_words() const { return units() * unit_vectors(code) * kRows; }
    // Groups that end in the middle of a unit leave holes between packed columns.
    int64_t chunks_of(int64_t g) const { return (columns_of(g) + kChunk - 1) / kChunk; }
    int64_t chunks() const { return (groups - 1) * chunks_of(0) + chunks_of(groups - 1); }
    // Tables: the chunks of this many neighbours share a power of two, so that small groups need none of their own.
    int64_t span() const { return group < kChunk ? kChunk / group : 1; }
    int64_t spans() const { return (chunks() + span() - 1) / span(); }
    bool straight() const { return order == nullptr && (groups == 1 || group % unit_columns(code) == 0); }
};

// One call of the fused product for `batch` <= kMaxBatch rows of activations.
struct Product {
    const void* x;        // prepared activations, interleaved by batch: float32 [padded][batch] or pairs of bfloat16 or int16
    const uint32_t* low;  // fixed point: the pairs' low parts, or null when the high parts are exact enough
    const float* steps;   // fixed point: [chunks][batch]; tables: [spans][batch]
    const int32_t *start, *low_start;  // small tables: what the sums of each chunk begin with, [chunks][batch]
    const float* sums;   // [groups][batch]: sum of x over each group
    const float* bias;   // [out] or null
    void* y;             // [batch][out]
    Dtype y_dtype;
    int batch;
};

// Where dequantized columns go: value of (row, column c) at out[column * stride + row - first row].
struct Tile {
    void* out;
    Dtype dtype;  // f32 or bf16
    int64_t stride;
    int64_t first, last;  // blocks
};

using ProductFn = void (*)(const Weight&, const Product&, int64_t first_block, int64_t last_block);
using DequantizeFn = void (*)(const Weight&, const Tile&, int64_t first_block, int64_t last_block);

struct Kernels {
    const char* isa;
    ProductFn product;        // x as float32, prescaled (see prepare in qlinear.cpp)
    ProductFn product_bf16;   // x as bfloat16 pairs; null where the CPU has no such instruction; bits 2, 3, 4
    ProductFn product_fixed;  // x as pairs of int16 (see prepare_fixed); null where product is as fast
    DequantizeFn dequantize;
    int quads = 0;  // up to this many rows, product takes x by four columns of a table's unit (see place_quad)
    // Tables, for up to `few` rows of fixed-point x; null where looking floats up is as fast.
    ProductFn product_small = nullptr;  // small tables: x in bytes (see prepare_small)
    ProductFn product_wide = nullptr;   // others, in 16 bits: x of 16 bits (see prepare_wide, prepare_row_table)
    int few = 0;
};

// Contiguous rows of activations.
struct Rows {
    void* x;
    int64_t rows, size;
    Dtype dtype;
};

// out = x / sqrt(mean(x^2) + eps), rounded, times weight [size]; out may be x.
void rms_norm(const Rows& r, const void* weight, void* out, float eps);
// x = x * cosines + (x with its halves exchanged) * sines, in place; both [size], the first half of sines negated.
void rotate(const Rows& r, const void* cosines, const void* sines);

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels avx512_bf16_kernels();
Kernels portable_table_kernels();  // for codes from kTable on
Kernels avx2_table_kernels();
Kernels avx512_table_kernels();
Kernels portable_row_table_kernels();  // for a table of each row
Kernels avx2_row_table_kernels();
Kernels avx512_row_table_kernels();

}  // namespace fewbits::qlinear
