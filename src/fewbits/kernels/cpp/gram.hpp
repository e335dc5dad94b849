// G += x^T x and C += y^T x. gram.cpp drives; the kernels below are serial and compiled per instruction set.
#pragma once

#include <cstdint>

namespace fewbits {

struct GramJob {
    float *g;       // [columns, columns], symmetric; of a product with another x [columns, its columns]
    const void *x;  // [rows, columns], rows `stride` elements apart
    std::int64_t rows, columns, stride;
    bool bfloat;  // bfloat16, else float32
};

constexpr int widest_panel = 48;

struct GramKernels {
    int panel;                 // columns of x packed together
    int depth;                 // rows of x multiplied before the sums go to G
    std::int64_t panel_bytes;  // of one packed panel of `depth` rows
    // Packs rows [row, row + depth) of one panel's columns; what lies outside x becomes zero.
    void (*pack)(const GramJob &, std::int64_t row, std::int64_t column, void *packed);
    // out[panel, panel] = (panel a)^T (panel b), over `depth` packed rows.
    void (*multiply)(const void *a, const void *b, float *out);
    // Around the calls of one thread: claims and gives back what a multiplication unit needs. May be null.
    void (*enter)(void *saved);
    void (*leave)(const void *saved);
    // The same added to a block of G, whose rows are `stride` apart. May be null.
    void (*multiply_into)(const void *a, const void *b, float *g, std::int64_t stride) = nullptr;
};

void add_gram(const GramJob &job, int threads);  // kernels for this CPU and the type of x
void add_gram(const GramJob &job, const GramKernels &k, int threads);

// left.g += left.x^T right.x, of as many rows and one type; not symmetric.
void add_cross(const GramJob &left, const GramJob &right, int threads);
void add_cross(const GramJob &left, const GramJob &right, const GramKernels &k, int threads);

const GramKernels &gram_portable();
const GramKernels &gram_avx2();
const GramKernels &gram_avx512();
const GramKernels &gram_amx();  // bfloat16 only

}  // namespace fewbits
