// Fake quantization: rows shared among threads, kernels chosen for this CPU.
#include "fake.hpp"

#include "bind.hpp"
#include "cpu.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace fewbits {
namespace {

const FakeKernels &kernels() { return best_kernels(fake_portable, FEWBITS_AVX2(fake_avx2), FEWBITS_AVX512(fake_avx512)); }

FakeJob job_of(std::uintptr_t w, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t out, std::int64_t columns,
               std::int64_t group, int qmin, int qmax) {
    FakeJob job = {};
    job.w = at<const float>(w);
    job.scale = at<const float>(scale);
    job.zero = at<const float>(zero);
    job.out = at<float>(out);
    job.columns = columns;
    job.group = group;
    job.groups = (columns + group - 1) / group;
    job.qmin = static_cast<float>(qmin);
    job.qmax = static_cast<float>(qmax);
    return job;
}

void fake_affine(std::uintptr_t w, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t out, std::int64_t rows,
                 std::int64_t columns, std::int64_t group, int qmin, int qmax, int threads) {
    const FakeJob job = job_of(w, scale, zero, out, columns, group, qmin, qmax);
    const auto run = kernels().forward;
    parallel_for(rows, 32, threads, [&](std::int64_t b, std::int64_t e) { run(job, b, e); });
}

void fake_affine_grad(std::uintptr_t w, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t out, std::int64_t rows,
                      std::int64_t columns, std::int64_t group, int qmin, int qmax, std::uintptr_t g,
                      std::uintptr_t of_scale, int threads) {
    FakeJob job = job_of(w, scale, zero, out, columns, group, qmin, qmax);
    job.g = at<const float>(g);
    job.of_scale = at<float>(of_scale);
    const auto run = kernels().backward;
    parallel_for(rows, 32, threads, [&](std::int64_t b, std::int64_t e) { run(job, b, e); });
}

}  // namespace

void bind_fake(nb::module_ &m) {
    m.def("fake_affine", &fake_affine, nb::call_guard<nb::gil_scoped_release>());
    m.def("fake_affine_grad", &fake_affine_grad, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace fewbits
