// y = x S^T for single weights S [out, in] by rows: float16 values at columns, row r has entries offsets[r] to offsets[r + 1].
#pragma once

#include <cstdint>

namespace fewbits {

struct SparseJob {
    const float *x;  // [tokens, in]
    const std::int32_t *offsets, *columns;
    const std::uint16_t *values;
    float *y;  // [tokens, out]
    std::int64_t tokens, in, out;
};

using SparseKernel = void (*)(const SparseJob &, std::int64_t begin, std::int64_t end);  // these rows of S

SparseKernel sparse_portable();
SparseKernel sparse_avx2();

}  // namespace fewbits
