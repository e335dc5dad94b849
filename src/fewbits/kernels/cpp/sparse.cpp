#include "sparse.hpp"

#include <cstring>

#include "bind.hpp"
#include "cpu.hpp"
#include "parallel.hpp"
#include "scratch.hpp"

namespace nb = nanobind;

namespace fewbits {
namespace {

constexpr std::int64_t fewest_entries = 1 << 17;  // below it a second thread costs as much as it saves

// float16 to float32; finite numbers only, subnormal ones too: the exponent is put right by one exact product.
inline float widen(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
    const std::uint32_t rest = static_cast<std::uint32_t>(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &rest, sizeof value);
    value *= 0x1p112f;
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

void rows(const SparseJob &job, std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = 0; t < job.tokens; ++t) {
        const float *x = job.x + t * job.in;
        for (std::int64_t r = begin; r < end; ++r) {
            float sum = 0.0f;
            for (std::int32_t e = job.offsets[r]; e < job.offsets[r + 1]; ++e) sum += widen(job.values[e]) * x[job.columns[e]];
            job.y[t * job.out + r] = sum;
        }
    }
}

// x as float32, from bfloat16 if need be.
const float *widened(std::uintptr_t x, bool bfloat, std::int64_t count) {
    if (!bfloat) return at<const float>(x);
    static thread_local Scratch memory;
    auto *const wide = reinterpret_cast<std::uint32_t *>(memory.get(parts(count, 16) * 64));
    for (std::int64_t i = 0; i < count; ++i) wide[i] = static_cast<std::uint32_t>(at<const std::uint16_t>(x)[i]) << 16;
    return reinterpret_cast<const float *>(wide);
}

void sparse_product(std::uintptr_t x, bool bfloat, std::uintptr_t offsets, std::uintptr_t columns, std::uintptr_t values,
                    std::uintptr_t y, std::int64_t tokens, std::int64_t in, std::int64_t out, int threads) {
    const SparseJob job{widened(x, bfloat, tokens * in), at<const std::int32_t>(offsets), at<const std::int32_t>(columns),
                        at<const std::uint16_t>(values), at<float>(y), tokens, in, out};
    const SparseKernel kernel = best_kernels<SparseKernel>(sparse_portable, FEWBITS_AVX2(sparse_avx2), nullptr);
    if (tokens * job.offsets[out] < fewest_entries) threads = 1;
    parallel_for(out, 64, threads, [&](std::int64_t begin, std::int64_t end) { kernel(job, begin, end); });
}

}  // namespace

SparseKernel sparse_portable() { return rows; }

void bind_sparse(nb::module_ &m) {
    m.def("sparse_product", &sparse_product, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace fewbits
