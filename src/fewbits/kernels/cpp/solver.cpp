// fit_affine and sweep_block_: work shared among threads, kernels chosen for this CPU.
#include "solver.hpp"

#include "bind.hpp"
#include "cpu.hpp"
#include "gram.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace fewbits {
namespace {

const SolverKernels &kernels() {
    return best_kernels(solver_portable, FEWBITS_AVX2(solver_avx2), FEWBITS_AVX512(solver_avx512));
}

void fit_affine(std::uintptr_t w, std::uintptr_t ratios, std::uintptr_t importance, std::uintptr_t scale,
                std::uintptr_t zero, std::int64_t rows, std::int64_t columns, std::int64_t group, int candidates,
                int qmax, float norm, bool symmetric, int type, int threads) {
    FitJob job;
    job.w = at<const float>(w);
    job.ratios = at<const float>(ratios);
    job.importance = at<const float>(importance);
    job.scale = at<float>(scale);
    job.zero = at<float>(zero);
    job.columns = columns;
    job.group = group;
    job.groups = (columns + group - 1) / group;
    job.candidates = candidates;
    job.qmax = static_cast<float>(qmax);
    job.norm = norm;
    job.symmetric = symmetric;
    job.type = static_cast<ScaleType>(type);
    const auto fit = kernels().fit;
    const std::int64_t grain = (16384 + group - 1) / group;
    parallel_for(rows * job.groups, grain, threads, [&](std::int64_t b, std::int64_t e) { fit(job, b, e); });
}

void sweep_block(std::uintptr_t w, std::uintptr_t u, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t segment,
                 std::uintptr_t codes, std::uintptr_t error, std::uintptr_t kept, std::int64_t rows, int block,
                 int segments, std::int64_t w_stride, std::int64_t u_stride, int qmax, float limit, int threads) {
    SweepJob job;
    job.w = at<float>(w);
    job.u = at<const float>(u);
    job.scale = at<const float>(scale);
    job.zero = at<const float>(zero);
    job.segment = at<const std::int32_t>(segment);
    job.codes = at<std::uint8_t>(codes);
    job.error = at<float>(error);
    job.kept = at<float>(kept);
    job.limit = limit;
    job.rows = rows;
    job.w_stride = w_stride;
    job.u_stride = u_stride;
    job.block = block;
    job.segments = segments;
    job.qmax = static_cast<float>(qmax);
    const auto sweep = kernels().sweep;
    parallel_for(rows, 64, threads, [&](std::int64_t b, std::int64_t e) { sweep(job, b, e); });
}

void gram(std::uintptr_t g, std::uintptr_t x, std::int64_t rows, std::int64_t columns, std::int64_t stride, bool bfloat,
          int threads) {
    add_gram({at<float>(g), at<const void>(x), rows, columns, stride, bfloat}, threads);
}

void cross(std::uintptr_t c, std::uintptr_t y, std::uintptr_t x, std::int64_t rows, std::int64_t y_columns,
           std::int64_t x_columns, std::int64_t y_stride, std::int64_t x_stride, bool bfloat, int threads) {
    add_cross({at<float>(c), at<const void>(y), rows, y_columns, y_stride, bfloat},
              {nullptr, at<const void>(x), rows, x_columns, x_stride, bfloat}, threads);
}

}  // namespace

// Long jobs release the interpreter; other Python threads (progress, prefetch) go on.
void bind_solver(nb::module_ &m) {
    m.def("fit_affine", &fit_affine, nb::call_guard<nb::gil_scoped_release>());
    m.def("sweep_block", &sweep_block, nb::call_guard<nb::gil_scoped_release>());
    m.def("gram", &gram, nb::call_guard<nb::gil_scoped_release>());
    m.def("cross", &cross, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace fewbits
