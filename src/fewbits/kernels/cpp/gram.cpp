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

// out is added to the block of C [rows, columns] at (row, column).
void add_block(float *c, std::int64_t rows, std::int64_t columns, int panel, std::int64_t row, std::int64_t column,
               const float *out) {
    const std::int64_t below = std::min<std::int64_t>(panel, rows - row);
    const std::int64_t across = std::min<std::int64_t>(panel, columns - column);
    for (std::int64_t i = 0; i < below; ++i) {
        float *to = c + (row + i) * columns + column;
        for (std::int64_t j = 0; j < across; ++j) to[j] += out[i * panel + j];
    }
}

struct Packed {
    const GramKernels &k;
    const GramJob &job;
    std::int64_t panels;
    char *data;
    void *at(std::int64_t chunk, std::int64_t p) const { return data + (chunk * panels + p) * k.panel_bytes; }
};

// One square of blocks: left panels from i0 times right panels from j0; of a symmetric result those above or on the diagonal.
void add_square(const Packed &left, const Packed &right, std::int64_t chunk, std::int64_t i0, std::int64_t j0,
                bool symmetric) {
    alignas(64) float out[widest_panel * widest_panel];
    const int panel = left.k.panel;
    const std::int64_t rows = left.job.columns, columns = right.job.columns;
    const std::int64_t i1 = std::min(i0 + panels_per_task, left.panels);
    const std::int64_t j1 = std::min(j0 + panels_per_task, right.panels);
    for (std::int64_t j = j0; j < j1; ++j) {
        for (std::int64_t i = i0; i < (symmetric ? std::min(i1, j + 1) : i1); ++i) {
            if (left.k.multiply_into && (i + 1) * panel <= rows && (j + 1) * panel <= columns) {
                float *c = left.job.g + i * panel * columns + j * panel;
                left.k.multiply_into(left.at(chunk, i), right.at(chunk, j), c, columns);
                continue;
            }
            left.k.multiply(left.at(chunk, i), right.at(chunk, j), out);
            add_block(left.job.g, rows, columns, panel, i * panel, j * panel, out);
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

// left.g += left.x^T right.x; the upper triangle only where both are one.
void add_product(const GramJob &left, const GramJob &right, const GramKernels &k, int threads) {
    const bool symmetric = &left == &right;
    const std::int64_t lefts = parts(left.columns, k.panel), rights = parts(right.columns, k.panel);
    const std::int64_t packed_panels = symmetric ? lefts : lefts + rights, chunks = parts(left.rows, k.depth);
    const std::int64_t chunk_bytes = packed_panels * k.panel_bytes;
    const std::int64_t at_once = std::max<std::int64_t>(1, std::min(chunks, packed_bytes / chunk_bytes));
    static thread_local Scratch packed_rows;
    char *const memory = packed_rows.get(at_once * chunk_bytes);
    const Packed a{k, left, lefts, memory};
    const Packed b{k, right, rights, symmetric ? memory : memory + at_once * lefts * k.panel_bytes};
    const std::int64_t down = parts(lefts, panels_per_task), across = parts(rights, panels_per_task);
    for (std::int64_t first = 0; first < chunks; first += at_once) {
        const std::int64_t count = std::min(at_once, chunks - first);
        parallel_for(count * packed_panels, 1, threads, [&](std::int64_t item, std::int64_t) {
            const std::int64_t at = item % packed_panels, chunk = item / packed_panels;
            const Packed &to = at < lefts ? a : b;
            const std::int64_t p = at < lefts ? at : at - lefts;
            k.pack(to.job, (first + chunk) * k.depth, p * k.panel, to.at(chunk, p));
        });
        parallel_for(down * across, 1, threads, [&](std::int64_t task, std::int64_t) {
            const std::int64_t i = task % down * panels_per_task, j = task / down * panels_per_task;
            if (symmetric && i > j) return;
            alignas(64) char saved[64];
            if (k.enter) k.enter(saved);
            for (std::int64_t chunk = 0; chunk < count; ++chunk) add_square(a, b, chunk, i, j, symmetric);
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
