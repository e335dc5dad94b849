// Exact products of int8 activations and int8 weights: y [T, N] = x [T, K] * w [N, K]^T in int32 (modulo 2^32).
//
// Layout. Rows of the weight are taken 16 at a time (a block); inside a block four columns at a time (a quad): 16 rows of 4
// bytes, so that a 32-bit lane belongs to one row. Columns and rows beyond the weight are 0.
#pragma once

#include <cstdint>

namespace fewbits::w8a8 {

constexpr int kRows = 16;

struct Weight {
    const int8_t* packed;  // [blocks][quads][16][4]
    const int32_t* sums;   // [blocks][16]: of each row
    int64_t out, in;

    int64_t blocks() const { return (out + kRows - 1) / kRows; }
    int64_t quads() const { return (in + 3) / 4; }
};

// Activations as the kernels read them: [tiles][quads][rows of a tile][4], int16 in the order of columns 0, 2, 1, 3, or uint8
// of x + 128. Rows beyond the last are not read.
struct Input {
    const void* x;
    int64_t rows;
    int32_t* y;  // [rows][out]
};

using ProductFn = void (*)(const Weight&, const Input&, int64_t first_block, int64_t last_block);

struct Kernels {
    const char* isa;
    bool bytes;  // x as uint8
    int tile;    // rows of x in a tile
    ProductFn product;
};

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();

}  // namespace fewbits::w8a8
