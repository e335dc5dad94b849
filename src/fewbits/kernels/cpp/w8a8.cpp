// Packing, choice of instruction set, and bindings of the int8 product.
#include "w8a8.hpp"

#include <nanobind/nanobind.h>

#include <cstring>
#include <vector>

#include "bind.hpp"
#include "cpu.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace fewbits::w8a8 {
namespace {

constexpr int64_t kGrain = 8;  // blocks of a task: 128 rows, whose bytes of kDepth quads are 64 KiB

Kernels choose() { return best_kernels(portable_kernels, FEWBITS_AVX2(avx2_kernels), FEWBITS_AVX512(avx512_kernels)); }

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Weight weight(uintptr_t packed, uintptr_t sums, int64_t out, int64_t in) {
    return {pointer<int8_t>(packed), pointer<int32_t>(sums), out, in};
}

void pack_block(const Weight& w, const int8_t* source, int64_t block) {
    auto* packed = const_cast<int8_t*>(w.packed) + block * w.quads() * kRows * 4;
    auto* sums = const_cast<int32_t*>(w.sums) + block * kRows;
    std::memset(packed, 0, size_t(w.quads() * kRows * 4));
    std::memset(sums, 0, kRows * 4);
    for (int64_t r = 0; r < kRows && block * kRows + r < w.out; ++r) {
        const int8_t* row = source + (block * kRows + r) * w.in;
        for (int64_t c = 0; c < w.in; c += 4) {
            const int64_t count = w.in - c < 4 ? w.in - c : 4;
            std::memcpy(packed + (c / 4 * kRows + r) * 4, row + c, size_t(count));
            for (int64_t j = 0; j < count; ++j) sums[r] += row[c + j];
        }
    }
}

template <class T>
void spread_row(const int8_t* x, int64_t columns, int64_t stride, T* out) {
    constexpr int place[4] = {0, sizeof(T) == 2 ? 2 : 1, sizeof(T) == 2 ? 1 : 2, 3}, offset = sizeof(T) == 2 ? 0 : 128;
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4, out += stride) {
        for (int j = 0; j < 4; ++j) out[place[j]] = T(x[c + j] + offset);
    }
    if (c < columns) {
        for (int j = 0; j < 4; ++j) out[place[j]] = T(c + j < columns ? x[c + j] + offset : 0);
    }
}

void product(const Weight& w, const int8_t* x, int64_t rows, int32_t* y, int threads) {
    const Kernels k = choose();
    const int64_t quads = w.quads(), size = k.bytes ? 1 : 2;
    thread_local std::vector<char> spread;
    spread.resize(size_t((rows + k.tile - 1) / k.tile * k.tile * quads * 4 * size));
    char* out = spread.data();  // of this thread, also in the threads below
    parallel_for(rows, 16, rows * w.in < 1 << 16 ? 1 : threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            char* to = out + (t / k.tile * quads * k.tile + t % k.tile) * 4 * size;
            if (k.bytes) spread_row(x + t * w.in, w.in, k.tile * 4, reinterpret_cast<uint8_t*>(to));
            else spread_row(x + t * w.in, w.in, k.tile * 4, reinterpret_cast<int16_t*>(to));
        }
    });
    const Input in{out, rows, y};
    parallel_for(w.blocks(), kGrain, rows * w.in * w.out < 1 << 18 ? 1 : threads,
                 [&](int64_t begin, int64_t end) { k.product(w, in, begin, end); });
}

}  // namespace
}  // namespace fewbits::w8a8

namespace fewbits {

void bind_w8a8(nb::module_& m) {
    using namespace w8a8;
    m.def("w8a8_isa", [] { return choose().isa; });
    m.def("w8a8_pack", [](uintptr_t source, uintptr_t packed, uintptr_t sums, int64_t out, int64_t in, int threads) {
        const nb::gil_scoped_release released;
        const Weight w = weight(packed, sums, out, in);
        parallel_for(w.blocks(), 4, threads, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) pack_block(w, pointer<int8_t>(source), b);
        });
    });
    m.def("w8a8_product", [](uintptr_t packed, uintptr_t sums, int64_t out, int64_t in, uintptr_t x, int64_t rows, uintptr_t y, int threads) {
        const nb::gil_scoped_release released;
        product(weight(packed, sums, out, in), pointer<int8_t>(x), rows, pointer<int32_t>(y), threads);
    });
}

}  // namespace fewbits
