// Blocking, threads and the mirror for G += x^T x and C += y^T x. Sums over `depth` rows are added to G in order of rows, each
// element by one thread at a time: the result does not depend on the number of threads.
#include "gram.hpp"

#include <algorithm>

#include "cpu.hpp"
#include "parallel.hpp"
#include "scratch.hpp"

namespace fewbits {
namespace {

constexpr std::int64_t panels_per_task = 8;  // left panels of a task stay in the second-level cache
// Memory for packed rows. Threads wait for each other once per filling; waits are dear on a busy machine.
constexpr std::int64_t packed_bytes = 16 << 20;

const GramKernels &kernels(bool bfloat) {
#if defined(FEWBITS_WITH_AMX)
    if (bfloat && isa() >= Isa::amx) return gram_amx();
#endif
    (void)bfloat;
    return best_kernels(gram_portable, FEWBITS_AVX2(gram_avx2), FEWBITS_AVX512(gram_avx512));
}

// out is added to the block of G at (row, column).
void add_block(const GramJob &job, int panel, std::int64_t row, std::int64_t column, const float *out) {
    const std::int64_t n = job.columns, rows = std::min<std::int64_t>(panel, n - row);
    const std::int64_t columns = std::min<std::int64_t>(panel, n - column);
    for (std::int64_t i = 0; i < rows; ++i) {
        float *g = job.g + (row + i) * n + column;
        for (std::int64_t j = 0; j < columns; ++j) g[j] += out[i * panel + j];
    }
}

struct Packed {
    const GramKernels &k;
    std::int64_t panels;
    char *data;
    void *at(std::int64_t chunk, std::int64_t p) const { return data + (chunk * panels + p) * k.panel_bytes; }
};

// One square of blocks: left panels from i0 times right panels from j0; of a symmetric result those above or on the diagonal.
void add_square(const GramJob &job, const Packed &left, const Packed &right, std::int64_t chunk, std::int64_t i0,
                std::int64_t j0, bool symmetric) {
    alignas(64) float out[widest_panel * widest_panel];
    const int panel = left.k.panel;
    const std::int64_t i1 = std::min(i0 + panels_per_task, left.panels);
    const std::int64_t j1 = std::min(j0 + panels_per_task, left.panels);
    for (std::int64_t j = j0; j < j1; ++j) {
        for (std::int64_t i = i0; i < (symmetric ? std::min(i1, j + 1) : i1); ++i) {
            if (left.k.multiply_into && (std::max(i, j) + 1) * panel <= job.columns) {
                float *g = job.g + i * panel * job.columns + j * panel;
                left.k.multiply_into(left.at(chunk, i), right.at(chunk, j), g, job.columns);
                continue;
            }
            left.k.multiply(left.at(chunk, i), right.at(chunk, j), out);
            add_block(job, panel, i * panel, j * panel, out);
        }
    }
}

void mirror(const GramJob &job, int panel, std::int64_t begin, std::int64_t end) {
    const std::int64_t n = job.columns;
    for (std::int64_t block = 0; block < end; block += panel) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t last = std::min(block + panel, i);
            for (std::int64_t j = block; j < last; ++j) job.g[i * n + j] = job.g[j * n + i];
        }
    }
}

// job.g += job.x^T right.x; the upper triangle only where both are one.
void add_product(const GramJob &job, const GramJob &right, const GramKernels &k, int threads) {
    const bool symmetric = &job == &right;
    const int panel = k.panel, operands = symmetric ? 1 : 2;
    const std::int64_t panels = (job.columns + panel - 1) / panel;
    const std::int64_t squares = (panels + panels_per_task - 1) / panels_per_task;
    const std::int64_t chunk_bytes = panels * k.panel_bytes, chunks = (job.rows + k.depth - 1) / k.depth;
    const std::int64_t at_once = std::max<std::int64_t>(1, std::min(chunks, packed_bytes / (operands * chunk_bytes)));
    static thread_local Scratch packed_rows;
    char *const memory = packed_rows.get(operands * at_once * chunk_bytes);
    const Packed packed[2] = {{k, panels, memory}, {k, panels, memory + (operands - 1) * at_once * chunk_bytes}};
    for (std::int64_t first = 0; first < chunks; first += at_once) {
        const std::int64_t count = std::min(at_once, chunks - first), items = count * panels;
        parallel_for(operands * items, 1, threads, [&](std::int64_t item, std::int64_t) {
            const std::int64_t which = item / items, chunk = item % items / panels, p = item % panels;
            k.pack(which ? right : job, (first + chunk) * k.depth, p * panel, packed[which].at(chunk, p));
        });
        parallel_for(squares * squares, 1, threads, [&](std::int64_t task, std::int64_t) {
            const std::int64_t i = task % squares * panels_per_task, j = task / squares * panels_per_task;
            if (symmetric && i > j) return;
            alignas(64) char saved[64];
            if (k.enter) k.enter(saved);
            for (std::int64_t chunk = 0; chunk < count; ++chunk) {
                add_square(job, packed[0], packed[1], chunk, i, j, symmetric);
            }
            if (k.leave) k.leave(saved);
        });
    }
}

}  // namespace

void add_gram(const GramJob &job, int threads) { add_gram(job, kernels(job.bfloat), threads); }

void add_gram(const GramJob &job, const GramKernels &k, int threads) {
    add_product(job, job, k, threads);
    const int panel = k.panel;
    parallel_for(job.columns, panel, threads, [&](std::int64_t b, std::int64_t e) { mirror(job, panel, b, e); });
}

void add_cross(const GramJob &left, const GramJob &right, int threads) {
    add_cross(left, right, kernels(left.bfloat), threads);
}

void add_cross(const GramJob &left, const GramJob &right, const GramKernels &k, int threads) {
    add_product(left, right, k, threads);
}

}  // namespace fewbits
