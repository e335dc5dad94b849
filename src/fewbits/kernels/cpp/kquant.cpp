// search_blocks: work shared among threads, kernels chosen for this CPU.
#include "kquant.hpp"

#include <vector>

#include "bind.hpp"
#include "cpu.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace fewbits {
namespace {

const BlockKernels &kernels() {
    return best_kernels(kquant_portable, FEWBITS_AVX2(kquant_avx2), FEWBITS_AVX2(kquant_avx2));
}

// Mean squares of the rows, each summed in order.
std::vector<float> energies(const BlockJob &job, int threads) {
    std::vector<float> found(static_cast<std::size_t>(job.rows));
    parallel_for(job.rows, 16, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
            const float *x = job.x + r * job.columns;
            float sum = 0.0f;
            for (std::int64_t c = 0; c < job.columns; ++c) sum += x[c] * x[c];
            found[static_cast<std::size_t>(r)] = sum / static_cast<float>(job.columns);
        }
    });
    return found;
}

void search_blocks(std::uintptr_t x, std::uintptr_t importance, std::uintptr_t codes, std::uintptr_t d,
                   std::uintptr_t m, std::uintptr_t scales, std::uintptr_t mins, std::int64_t rows,
                   std::int64_t columns, int block, int type, int threads) {
    BlockJob job;
    job.x = at<const float>(x);
    job.importance = at<const float>(importance);
    job.energy = nullptr;
    job.codes = at<std::uint8_t>(codes);
    job.d = at<std::uint16_t>(d);
    job.m = at<std::uint16_t>(m);
    job.scales = at<std::int8_t>(scales);
    job.mins = at<std::int8_t>(mins);
    job.rows = rows;
    job.columns = columns;
    job.type = static_cast<BlockType>(type);
    std::vector<float> energy;
    if (job.importance != nullptr && block == 32) {
        energy = energies(job, threads);
        job.energy = energy.data();
    }
    const auto search = kernels().search;
    const std::int64_t grain = 16384 / block;
    parallel_for(rows * (columns / block), grain, threads,
                 [&](std::int64_t b, std::int64_t e) { search(job, b, e); });
}

}  // namespace

void bind_kquant(nb::module_ &m) { m.def("search_blocks", &search_blocks, nb::call_guard<nb::gil_scoped_release>()); }

}  // namespace fewbits
