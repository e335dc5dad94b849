// Serial kernels of fake quantization; fake.cpp shares the rows among threads. kernels/fakequant.py is the specification.
#pragma once

#include <cstdint>

namespace fewbits {

struct FakeJob {
    const float *w;            // [rows, columns]
    const float *scale, *zero; // [rows, groups]
    float *out;                // [rows, columns]: the fake weight, or the gradient of w
    const float *g;            // [rows, columns]: the gradient of the fake weight, or null
    float *of_scale;           // [rows, groups], with g
    std::int64_t columns, group, groups;
    float qmin, qmax;
};

struct FakeKernels {
    void (*forward)(const FakeJob &, std::int64_t row_begin, std::int64_t row_end);
    void (*backward)(const FakeJob &, std::int64_t row_begin, std::int64_t row_end);
};

const FakeKernels &fake_portable();
const FakeKernels &fake_avx2();
const FakeKernels &fake_avx512();

}  // namespace fewbits
