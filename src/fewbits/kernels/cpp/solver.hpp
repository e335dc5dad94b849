// Serial kernels of the solver ops; solver.cpp shares the rows among threads. reference.py is the specification.
#pragma once

#include <cstdint>

namespace fewbits {

enum class ScaleType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

struct FitJob {
    const float *w;           // [rows, columns]
    const float *ratios;      // [candidates, 2]: of the lower end, of the upper end
    const float *importance;  // [columns] or null
    float *scale, *zero;      // [rows, groups]
    std::int64_t columns, group, groups;
    int candidates;
    float qmax, norm;
    bool symmetric;
    ScaleType type;
};

struct SweepJob {
    float *w;        // [rows, block], rows w_stride apart; compensated in place
    const float *u;  // [block, block], rows u_stride apart; upper triangular
    const float *scale, *zero;     // [rows, segments]
    const std::int32_t *segment;   // [block]
    std::uint8_t *codes;           // [rows, block]
    float *error;                  // [rows, block]
    float *kept;                   // [rows, block], or null: zero points are integers and nothing is kept
    std::int64_t rows, w_stride, u_stride;
    int block, segments;
    float qmax, limit;  // of e^2, above which what is left of a weight is kept
};

constexpr int max_candidates = 1024;
constexpr int max_block = 256;

struct SolverKernels {
    // Groups `begin` to `end` of the row-major sequence of all (row, group).
    void (*fit)(const FitJob &, std::int64_t begin, std::int64_t end);
    void (*sweep)(const SweepJob &, std::int64_t row_begin, std::int64_t row_end);
};

const SolverKernels &solver_portable();
const SolverKernels &solver_avx2();
const SolverKernels &solver_avx512();

}  // namespace fewbits
