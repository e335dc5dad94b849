// Products of float32 rows with weights of at most 4 bits, in bytes: every run of 32 values of a row of x gets a scale of
// its own and codes of 8 bits, and meets the codes of the weight as they are. Two products of bytes are added in 16 bits
// in one instruction (AVX2: VPMADDUBSW), twice as many as VPMADDWD multiplies; no sum of a run overflows:
// 8 * 2 * 127 * 15 < 2^15.
#pragma once

#include <cstdint>

namespace fewbits {

constexpr int few_panel = 48;  // rows of an operand packed together
constexpr int few_run = 32;    // values of a row that share a scale; the groups of a weight are whole runs
constexpr int few_most = 127;  // largest code of x; codes of the weight are 0 to 15
// A packed run of a panel: [few_run / 4][few_panel] words of four codes, then two floats for each row.
// Of x: its scale, and scale * sum of codes. Of the weight: its scale, and scale * zero point.
constexpr std::int64_t few_bytes = few_run * few_panel + 2 * few_panel * 4;

struct FewKernels {
    // Packs up to `few_run` values of each of `rows` rows of x, `stride` elements apart; rows that are missing become zero.
    void (*pack)(const float *x, std::int64_t stride, int rows, int depth, void *packed);
    // sums[group][panel] = sums over the runs of each group of a packed panel of x: what meets the zero points of w.
    void (*add)(const void *x, std::int64_t runs, std::int64_t per_group, float *sums);
    // out[panel][panel] = (panel of x) (panel of w)^T over `runs` runs; zero points are those of the first run of a group.
    void (*multiply)(const void *x, const float *sums, const void *w, std::int64_t runs, std::int64_t per_group, float *out);
};

const FewKernels &few_portable();
const FewKernels &few_avx2();

}  // namespace fewbits
