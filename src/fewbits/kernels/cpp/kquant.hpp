// Searches for the scales and codes of GGUF's block types, as llama.cpp's reference quantizers define them, to the bit.
// kquant.cpp drives; the kernels are compiled per instruction set.
#pragma once

#include <cstdint>

namespace fewbits {

// ggml's own type numbers.
enum class BlockType : int {
    q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14,
    iq4_nl = 20, iq4_xs = 23, tq1_0 = 34, tq2_0 = 35, mxfp4 = 39,
};

struct BlockJob {
    const float *x;           // [rows, columns]; columns is a multiple of the block length
    const float *importance;  // [columns], or null
    const float *energy;      // [rows], mean square of each row; only read with importance by the types of 32 columns
    std::uint8_t *codes;      // [rows, columns], unsigned
    std::uint16_t *d;         // [rows, columns / block], half (MXFP4: the exponent byte)
    std::uint16_t *m;         // [rows, columns / block], half; null for types without offset
    std::int8_t *scales;      // [rows, columns / sub-block]; null for types of one scale
    std::int8_t *mins;        // [rows, columns / sub-block]; null for types without
    std::int64_t rows, columns;
    BlockType type;
};

struct BlockKernels {
    // Blocks `begin` to `end` of the row-major sequence of all blocks.
    void (*search)(const BlockJob &, std::int64_t begin, std::int64_t end);
};

const BlockKernels &kquant_portable();
const BlockKernels &kquant_avx2();

}  // namespace fewbits
