// y = x w^T in fixed point. The weight is packed first, by all threads; then each thread packs panels of x for itself
// and multiplies them by the whole weight. Sums over runs are added in order: the number of threads changes nothing.
#include "fixed.hpp"

#include <nanobind/stl/array.h>

#include <algorithm>
#include <array>

#include "bind.hpp"
#include "cpu.hpp"
#include "panel_out.hpp"
#include "parallel.hpp"
#include "scratch.hpp"

namespace nb = nanobind;

namespace fewbits {
namespace {

// Of the calling thread: what is packed for all; of each thread: what it packs for itself.
thread_local Scratch shared_memory, own_memory;

// Values in run `chunk` of `all`, rows in panel `panel` of `all`.
int depth_of(std::int64_t all, std::int64_t chunk) {
    return static_cast<int>(std::min<std::int64_t>(fixed_depth, all - chunk * fixed_depth));
}

int rows_of(std::int64_t all, std::int64_t panel) {
    return static_cast<int>(std::min<std::int64_t>(fixed_panel, all - panel * fixed_panel));
}

void linear(std::uintptr_t y, std::uintptr_t x, std::uintptr_t w, std::uintptr_t bias, std::int64_t tokens,
            std::int64_t columns, std::int64_t out, std::int64_t x_stride, std::int64_t w_stride, int threads) {
    FixedJob job;
    job.y = reinterpret_cast<float *>(y);
    job.x = reinterpret_cast<const float *>(x);
    job.w = reinterpret_cast<const float *>(w);
    job.bias = reinterpret_cast<const float *>(bias);
    job.tokens = tokens;
    job.columns = columns;
    job.out = out;
    job.x_stride = x_stride;
    job.w_stride = w_stride;
    fixed_linear(job, threads);
}

void attention(std::uintptr_t y, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v,
               std::array<std::int64_t, 5> sizes, std::array<std::int64_t, 9> strides, float scale, bool causal,
               int threads) {
    AttentionJob job;
    job.y = reinterpret_cast<float *>(y);
    job.q = reinterpret_cast<const float *>(q);
    job.k = reinterpret_cast<const float *>(k);
    job.v = reinterpret_cast<const float *>(v);
    job.batch = sizes[0], job.heads = sizes[1], job.kv_heads = sizes[2], job.tokens = sizes[3], job.width = sizes[4];
    std::copy(strides.begin(), strides.begin() + 3, job.q_stride);
    std::copy(strides.begin() + 3, strides.begin() + 6, job.k_stride);
    std::copy(strides.begin() + 6, strides.end(), job.v_stride);
    job.scale = scale;
    job.causal = causal;
    fixed_attention(job, threads);
}

void gram(std::uintptr_t g, std::uintptr_t x, std::int64_t rows, std::int64_t columns, std::int64_t stride,
          int threads) {
    add_gram({reinterpret_cast<float *>(g), reinterpret_cast<const void *>(x), rows, columns, stride, false},
             fixed_kernels().gram, threads);
}

void cross(std::uintptr_t c, std::uintptr_t y, std::uintptr_t x, std::int64_t rows, std::int64_t y_columns,
           std::int64_t x_columns, std::int64_t y_stride, std::int64_t x_stride, int threads) {
    add_cross({reinterpret_cast<float *>(c), reinterpret_cast<const void *>(y), rows, y_columns, y_stride, false},
              {nullptr, reinterpret_cast<const void *>(x), rows, x_columns, x_stride, false}, fixed_kernels().gram,
              threads);
}

}  // namespace

const FixedKernels &fixed_kernels() {
#if defined(FEWBITS_WITH_AVX2)
    if (isa() >= Isa::avx2) return fixed_avx2();
#endif
    return fixed_portable();
}

void fixed_linear(const FixedJob &job, int threads) {
    const FixedKernels &k = fixed_kernels();
    const std::int64_t chunks = (job.columns + fixed_depth - 1) / fixed_depth;
    const std::int64_t rights = (job.out + fixed_panel - 1) / fixed_panel;
    const std::int64_t lefts = (job.tokens + fixed_panel - 1) / fixed_panel;
    const std::int64_t panel_bytes = chunks * fixed_bytes;
    const bool past = outgrows_caches(job.tokens, job.out);
    char *const weight = shared_memory.get(rights * panel_bytes);
    parallel_for(rights, 1, threads, [&](std::int64_t j, std::int64_t) {
        for (std::int64_t c = 0; c < chunks; ++c) {
            k.pack(job.w + j * fixed_panel * job.w_stride + c * fixed_depth, job.w_stride, rows_of(job.out, j),
                   depth_of(job.columns, c), weight + j * panel_bytes + c * fixed_bytes);
        }
    });
    parallel_for(lefts, 1, threads, [&](std::int64_t i, std::int64_t) {
        alignas(64) float out[fixed_panel * fixed_panel];
        char *const input = own_memory.get(panel_bytes);
        for (std::int64_t c = 0; c < chunks; ++c) {
            k.pack(job.x + i * fixed_panel * job.x_stride + c * fixed_depth, job.x_stride, rows_of(job.tokens, i),
                   depth_of(job.columns, c), input + c * fixed_bytes);
        }
        for (std::int64_t j = 0; j < rights; ++j) {
            const char *right = weight + j * panel_bytes;
            float *const to = job.y + i * fixed_panel * job.out + j * fixed_panel;
            const int rows = rows_of(job.tokens, i), columns = rows_of(job.out, j);
            for (std::int64_t c = 0; c < chunks; ++c) {
                k.multiply(input + c * fixed_bytes, right + c * fixed_bytes, columns, depth_of(job.columns, c), c > 0, out,
                           fixed_panel);
            }
            put(to, job.out, out, fixed_panel, rows, columns, job.bias ? job.bias + j * fixed_panel : nullptr, past);
        }
    });
}

void fixed_attention(const AttentionJob &job, int threads) {
    const FixedKernels &kernels = fixed_kernels();
    const std::int64_t panels = parts(job.tokens, fixed_panel), runs = parts(job.tokens, fixed_depth);
    const std::int64_t width_runs = parts(job.width, fixed_depth), width_panels = parts(job.width, fixed_panel);
    const std::int64_t k_bytes = panels * width_runs * fixed_bytes, v_bytes = runs * width_panels * fixed_bytes;
    const std::int64_t stored = job.batch * job.kv_heads, padded = runs * fixed_depth;
    char *const keys = shared_memory.get(stored * (k_bytes + v_bytes)), *const values = keys + stored * k_bytes;
    parallel_for(stored * panels, 1, threads, [&](std::int64_t item, std::int64_t) {
        const std::int64_t head = item / panels, p = item % panels;
        const float *k = job.k + head / job.kv_heads * job.k_stride[0] + head % job.kv_heads * job.k_stride[1];
        for (std::int64_t c = 0; c < width_runs; ++c) {
            kernels.pack(k + p * fixed_panel * job.k_stride[2] + c * fixed_depth, job.k_stride[2],
                         rows_of(job.tokens, p), depth_of(job.width, c),
                         keys + head * k_bytes + (p * width_runs + c) * fixed_bytes);
        }
    });
    parallel_for(stored * runs, 1, threads, [&](std::int64_t item, std::int64_t) {
        const std::int64_t head = item / runs, c = item % runs;
        const float *v = job.v + head / job.kv_heads * job.v_stride[0] + head % job.kv_heads * job.v_stride[1];
        for (std::int64_t p = 0; p < width_panels; ++p) {
            kernels.pack_columns(v + c * fixed_depth * job.v_stride[2] + p * fixed_panel, job.v_stride[2],
                                 rows_of(job.width, p), depth_of(job.tokens, c),
                                 values + head * v_bytes + (c * width_panels + p) * fixed_bytes);
        }
    });
    parallel_for(job.batch * job.heads * panels, 1, threads, [&](std::int64_t item, std::int64_t) {
        // Long rows first: what is left at the end is short.
        const std::int64_t i = panels - 1 - item % panels, head = item / panels % job.heads;
        const std::int64_t b = item / panels / job.heads;
        const std::int64_t stored_head = b * job.kv_heads + head / (job.heads / job.kv_heads);
        const std::int64_t seen = job.causal ? std::min((i + 1) * fixed_panel, job.tokens) : job.tokens;
        const int rows = rows_of(job.tokens, i);
        const std::int64_t out_stride = width_panels * fixed_panel;
        const std::int64_t query_bytes = width_runs * fixed_bytes, score_bytes = fixed_panel * (padded + fixed_panel) * 4;
        char *const query = own_memory.get(query_bytes + fixed_bytes + score_bytes + fixed_panel * out_stride * 4);
        char *const weights = query + query_bytes;
        float *const scores = reinterpret_cast<float *>(weights + fixed_bytes);
        float *const out = reinterpret_cast<float *>(weights + fixed_bytes + score_bytes);
        const std::int64_t stride = padded + fixed_panel;  // the last panel of keys may end beyond the last run
        const float *q = job.q + b * job.q_stride[0] + head * job.q_stride[1] + i * fixed_panel * job.q_stride[2];
        for (std::int64_t c = 0; c < width_runs; ++c) {
            kernels.pack(q + c * fixed_depth, job.q_stride[2], rows, depth_of(job.width, c), query + c * fixed_bytes);
        }
        for (std::int64_t j = 0; j * fixed_panel < seen; ++j) {
            const char *k = keys + stored_head * k_bytes + j * width_runs * fixed_bytes;
            for (std::int64_t c = 0; c < width_runs; ++c) {
                kernels.multiply(query + c * fixed_bytes, k + c * fixed_bytes, fixed_panel, depth_of(job.width, c), c > 0,
                                 scores + j * fixed_panel, stride);
            }
        }
        float sum[fixed_panel];
        kernels.soften(scores, stride, rows, job.causal ? i * fixed_panel + 1 : job.tokens, job.causal, job.scale, sum);
        for (std::int64_t c = 0; c * fixed_depth < seen; ++c) {
            kernels.pack(scores + c * fixed_depth, stride, rows, fixed_depth, weights);
            const char *v = values + stored_head * v_bytes + c * width_panels * fixed_bytes;
            for (std::int64_t p = 0; p < width_panels; ++p) {
                kernels.multiply(weights, v + p * fixed_bytes, rows_of(job.width, p), fixed_depth, c > 0,
                                 out + p * fixed_panel, out_stride);
            }
        }
        for (int r = 0; r < rows; ++r) {
            float *y = job.y + ((b * job.tokens + i * fixed_panel + r) * job.heads + head) * job.width;
            for (std::int64_t d = 0; d < job.width; ++d) y[d] = out[r * out_stride + d] / sum[r];
        }
    });
}

void bind_fixed(nb::module_ &m) {
    m.def("fixed_linear", &linear, nb::call_guard<nb::gil_scoped_release>());
    m.def("fixed_attention", &attention, nb::call_guard<nb::gil_scoped_release>());
    m.def("fixed_cross", &cross, nb::call_guard<nb::gil_scoped_release>());
    m.def("fixed_gram", &gram, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace fewbits
