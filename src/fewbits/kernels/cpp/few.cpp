// y = x w^T with w of few bits. The weight is packed once, when it is quantized; each thread packs panels of x for itself.
// Sums over runs are added in order: the number of threads changes nothing.
#include "few.hpp"

#include <algorithm>
#include <cstring>

#include "bind.hpp"
#include "cpu.hpp"
#include "panel_out.hpp"
#include "parallel.hpp"
#include "scratch.hpp"

namespace nb = nanobind;

namespace fewbits {
namespace {

thread_local Scratch own_panel, own_sums;

const FewKernels &few_kernels() {
#if defined(FEWBITS_WITH_AVX2)
    if (isa() >= Isa::avx2) return few_avx2();
#endif
    return few_portable();
}

int rows_of(std::int64_t all, std::int64_t panel) {
    return static_cast<int>(std::min<std::int64_t>(few_panel, all - panel * few_panel));
}

// Bytes of a packed weight [rows, columns].
std::int64_t few_size(std::int64_t rows, std::int64_t columns) {
    return parts(rows, few_panel) * parts(columns, few_run) * few_bytes;
}

// codes [rows, columns], scale and zero [rows, groups of `group` columns].
void few_weight(std::uintptr_t out, std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero, std::int64_t rows,
                std::int64_t columns, std::int64_t group, int threads) {
    const auto *q = reinterpret_cast<const std::uint8_t *>(codes);
    const auto *s = reinterpret_cast<const float *>(scale), *z = reinterpret_cast<const float *>(zero);
    const std::int64_t runs = parts(columns, few_run), groups = parts(columns, group);
    parallel_for(parts(rows, few_panel), 1, threads, [&](std::int64_t p, std::int64_t) {
        const int here = rows_of(rows, p);
        for (std::int64_t run = 0; run < runs; ++run) {
            char *to = reinterpret_cast<char *>(out) + (p * runs + run) * few_bytes;
            float *scales = reinterpret_cast<float *>(to + few_run * few_panel), *zeros = scales + few_panel;
            std::memset(to, 0, few_bytes);
            const std::int64_t first = run * few_run, depth = std::min<std::int64_t>(few_run, columns - first);
            for (int r = 0; r < here; ++r) {
                const std::int64_t row = p * few_panel + r, at = row * groups + first / group;
                scales[r] = s[at], zeros[r] = s[at] * z[at];
                for (std::int64_t k = 0; k < depth; ++k) to[k / 4 * few_panel * 4 + r * 4 + k % 4] = q[row * columns + first + k];
            }
        }
    });
}

void few_linear(std::uintptr_t y_at, std::uintptr_t x_at, std::uintptr_t w_at, std::uintptr_t bias_at,
                std::int64_t tokens, std::int64_t columns, std::int64_t out, std::int64_t group, std::int64_t x_stride,
                int threads) {
    const FewKernels &k = few_kernels();
    const auto *x = reinterpret_cast<const float *>(x_at), *bias = reinterpret_cast<const float *>(bias_at);
    const char *w = reinterpret_cast<const char *>(w_at);
    float *const y = reinterpret_cast<float *>(y_at);
    const std::int64_t runs = parts(columns, few_run), per_group = std::min(parts(group, few_run), runs);
    const bool past = outgrows_caches(tokens, out);
    parallel_for(parts(tokens, few_panel), 1, threads, [&](std::int64_t i, std::int64_t) {
        alignas(64) float product[few_panel * few_panel];
        char *const input = own_panel.get(runs * few_bytes);
        float *const sums = reinterpret_cast<float *>(own_sums.get(parts(runs, per_group) * few_panel * 4));
        const int rows = rows_of(tokens, i);
        for (std::int64_t run = 0; run < runs; ++run) {
            const std::int64_t first = run * few_run;
            k.pack(x + i * few_panel * x_stride + first, x_stride, rows,
                   static_cast<int>(std::min<std::int64_t>(few_run, columns - first)), input + run * few_bytes);
        }
        k.add(input, runs, per_group, sums);
        for (std::int64_t j = 0; j * few_panel < out; ++j) {
            float *const to = y + i * few_panel * out + j * few_panel;
            const int here = rows_of(out, j);
            k.multiply(input, sums, w + j * runs * few_bytes, runs, per_group, product);
            put(to, out, product, few_panel, rows, here, bias ? bias + j * few_panel : nullptr, past);
        }
    });
}

}  // namespace

void bind_few(nb::module_ &m) {
    m.def("few_size", &few_size);
    m.def("few_weight", &few_weight, nb::call_guard<nb::gil_scoped_release>());
    m.def("few_linear", &few_linear, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace fewbits
