// Blocking, threads and the mirror for G += x^T x. Sums over `depth` rows are added to G in order of rows, each
// element by one thread at a time: the result does not depend on the number of threads.
#include "gram.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu.hpp"
#include "parallel.hpp"

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

struct Free {
    void operator()(void *p) const { std::free(p); }
};

// Kept by the calling thread from call to call: the system's zeroing of fresh pages would cost as much as the product.
char *scratch(std::int64_t bytes) {
    static thread_local std::unique_ptr<void, Free> memory;
    static thread_local std::int64_t size = 0;
    if (size < bytes) {
        size = 0;
        memory.reset(std::aligned_alloc(64, bytes));
        if (!memory) throw std::bad_alloc();
        size = bytes;
    }
    return static_cast<char *>(memory.get());
}

// out is added to the block of G at (row, column); only the upper triangle matters here.
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

// One square of blocks: left panels [i0, i1) times right panels [j0, j1), blocks above or on the diagonal.
void add_square(const GramJob &job, const Packed &packed, std::int64_t chunk, std::int64_t i0, std::int64_t j0) {
    alignas(64) float out[widest_panel * widest_panel];
    const int panel = packed.k.panel;
    const std::int64_t i1 = std::min(i0 + panels_per_task, packed.panels);
    const std::int64_t j1 = std::min(j0 + panels_per_task, packed.panels);
    for (std::int64_t j = j0; j < j1; ++j) {
        for (std::int64_t i = i0; i < std::min(i1, j + 1); ++i) {
            if (packed.k.multiply_into && (j + 1) * panel <= job.columns) {
                float *g = job.g + i * panel * job.columns + j * panel;
                packed.k.multiply_into(packed.at(chunk, i), packed.at(chunk, j), g, job.columns);
                continue;
            }
            packed.k.multiply(packed.at(chunk, i), packed.at(chunk, j), out);
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

}  // namespace

void add_gram(const GramJob &job, int threads) { add_gram(job, kernels(job.bfloat), threads); }

void add_gram(const GramJob &job, const GramKernels &k, int threads) {
    const int panel = k.panel;
    const std::int64_t panels = (job.columns + panel - 1) / panel;
    const std::int64_t squares = (panels + panels_per_task - 1) / panels_per_task;
    const std::int64_t chunk_bytes = panels * k.panel_bytes, chunks = (job.rows + k.depth - 1) / k.depth;
    const std::int64_t at_once = std::max<std::int64_t>(1, std::min(chunks, packed_bytes / chunk_bytes));
    const Packed packed = {k, panels, scratch(at_once * chunk_bytes)};
    for (std::int64_t first = 0; first < chunks; first += at_once) {
        const std::int64_t count = std::min(at_once, chunks - first);
        parallel_for(count * panels, 1, threads, [&](std::int64_t item, std::int64_t) {
            const std::int64_t chunk = item / panels, p = item % panels;
            k.pack(job, (first + chunk) * k.depth, p * panel, packed.at(chunk, p));
        });
        parallel_for(squares * squares, 1, threads, [&](std::int64_t task, std::int64_t) {
            const std::int64_t i = task % squares * panels_per_task, j = task / squares * panels_per_task;
            if (i > j) return;
            alignas(64) char saved[64];
            if (k.enter) k.enter(saved);
            for (std::int64_t chunk = 0; chunk < count; ++chunk) add_square(job, packed, chunk, i, j);
            if (k.leave) k.leave(saved);
        });
    }
    parallel_for(job.columns, panel, threads, [&](std::int64_t b, std::int64_t e) { mirror(job, panel, b, e); });
}

}  // namespace fewbits
