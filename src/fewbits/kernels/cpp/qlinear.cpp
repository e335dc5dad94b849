// Packing, preparation of activations, choice of instruction set, and bindings of the weight-only linear layer.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <utility>

#include "bind.hpp"
#include "cpu.hpp"
#include "parallel.hpp"
#include "qlinear.hpp"
#include "qlinear_prepare.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nb = nanobind;

namespace fewbits::qlinear {
namespace {

constexpr int64_t kWorthAThread = 1 << 16;  // weights; below, waking a thread costs more than it saves

Kernels choose() {
#if defined(FEWBITS_WITH_AMX)
    if (isa() >= Isa::avx512 && __builtin_cpu_supports("avx512bf16")) return avx512_bf16_kernels();
#endif
    return best_kernels(portable_kernels, FEWBITS_AVX2(avx2_kernels), FEWBITS_AVX512(avx512_kernels));
}

Kernels choose_tables() {
    return best_kernels(portable_table_kernels, FEWBITS_AVX2(avx2_table_kernels), FEWBITS_AVX512(avx512_table_kernels));
}

Kernels choose_row_tables() {
    return best_kernels(portable_row_table_kernels, FEWBITS_AVX2(avx2_row_table_kernels), FEWBITS_AVX512(avx512_row_table_kernels));
}

// Place of a column's code in a row of kRowTable: the word, and the shift in it.
std::pair<int64_t, int> place_by_row(int64_t column) {
    const int64_t at = column % kRowUnit;
    return {column / kRowUnit * kRows + at % kRows, int(at / kRows) * 4};
}

void pack_unit(int bits, const uint8_t* codes, int64_t count, uint32_t* lane) {
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t code = codes[j];
        if (bits != 3) {
            lane[0] |= code << step_of(bits, int(j));
            continue;
        }
        const int v = int(j) / 16, s = 2 * ((int(j) % 16) / 2), half = 16 * (int(j) % 2);
        lane[v * kRows] |= (code & 3) << (s + half);
        lane[2 * kRows] |= (code >> 2) << (half + (s + 2 + v) % 16);
    }
}

uint8_t unpack_code(int bits, const uint32_t* lane, int j) {
    if (bits != 3) return uint8_t((lane[0] >> step_of(bits, j)) & ((1u << bits) - 1));
    const int v = j / 16, s = 2 * ((j % 16) / 2), half = 16 * (j % 2);
    return uint8_t(((lane[v * kRows] >> (s + half)) & 3) | (((lane[2 * kRows] >> (half + (s + 2 + v) % 16)) & 1) << 2));
}

// Walks the units of one block: visit(first packed column, columns, lane of row 0).
template <class Visit>
void each_unit(const Weight& w, int64_t block, const Visit& visit) {
    const int64_t unit = unit_columns(w.code), words = unit_vectors(w.code) * kRows;
    int64_t at = block * w.block_words();
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t columns = w.columns_of(g);
        for (int64_t c = 0; c < columns; c += unit, at += words) {
            visit(g * w.group + c, columns - c < unit ? columns - c : unit, at);
        }
    }
}

void pack_block(const Weight& w, const uint8_t* codes, uint32_t* packed, int64_t block) {
    std::memset(packed + block * w.block_words(), 0, size_t(w.block_words()) * 4);
    for (int64_t r = 0; r < kRows && block * kRows + r < w.out; ++r) {
        const uint8_t* row = codes + (block * kRows + r) * w.in;
        if (w.code == kRowTable) {
            uint32_t* words = packed + block * w.block_words() + r * w.block_words() / kRows;
            for (int64_t c = 0; c < w.in; ++c) {
                const auto [word, shift] = place_by_row(c);
                words[word] |= uint32_t(row[c]) << shift;
            }
            continue;
        }
        each_unit(w, block, [&](int64_t column, int64_t count, int64_t at) {
            uint8_t gathered[32];
            const uint8_t* source = row + column;
            if (w.order) {
                for (int64_t j = 0; j < count; ++j) gathered[j] = row[w.order[column + j]];
                source = gathered;
            }
            uint32_t* lane = packed + at + r;
            if (w.bits == 4 && count == 8) {  // the usual case without a branch per code
                uint64_t c;
                std::memcpy(&c, source, 8);
                const uint64_t even = c & 0x000f000f000f000full, odd = (c >> 8) & 0x000f000f000f000full;
                const auto squeeze = [](uint64_t v) { return uint32_t((v | v >> 12 | v >> 24 | v >> 36) & 0xffff); };
                lane[0] = squeeze(even) | squeeze(odd) << 16;
            } else {
                pack_unit(w.bits, source, count, lane);
            }
        });
    }
}

void unpack_block(const Weight& w, uint8_t* codes, int64_t block) {
    for (int64_t r = 0; r < kRows && block * kRows + r < w.out; ++r) {
        uint8_t* row = codes + (block * kRows + r) * w.in;
        if (w.code == kRowTable) {
            const uint32_t* words = w.codes + block * w.block_words() + r * w.block_words() / kRows;
            for (int64_t c = 0; c < w.in; ++c) {
                const auto [word, shift] = place_by_row(c);
                row[c] = (words[word] >> shift) & 15;
            }
            continue;
        }
        each_unit(w, block, [&](int64_t column, int64_t count, int64_t at) {
            for (int64_t j = 0; j < count; ++j) {
                row[w.order ? w.order[column + j] : column + j] = unpack_code(w.bits, w.codes + at + r, int(j));
            }
        });
    }
}

void use_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t first = (uintptr_t(begin) + page - 1) & ~(page - 1), last = (uintptr_t(begin) + uintptr_t(bytes)) & ~(page - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)bytes;
#endif
}

int useful_threads(const Weight& w, int threads) {
    const int64_t most = w.out * w.in / kWorthAThread;
    return most < 1 ? 1 : most < threads ? int(most) : threads;
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Addresses of tensors that the Python object keeps alive beside this one.
class Packed {
  public:
    Packed(int code, int64_t out, int64_t in, int64_t group, nb::tuple addresses, int scale_dtype) {
        w_ = {pointer<uint32_t>(nb::cast<uintptr_t>(addresses[0])), pointer<void>(nb::cast<uintptr_t>(addresses[1])),
              pointer<uint8_t>(nb::cast<uintptr_t>(addresses[2])), pointer<int32_t>(nb::cast<uintptr_t>(addresses[3])),
              pointer<float>(nb::cast<uintptr_t>(addresses[4])), static_cast<Dtype>(scale_dtype), code, bits_of(code), out, in, group, (in + group - 1) / group, {}};
        if (w_.table) w_.ints = int_table(w_.table);
    }

    void pack(uintptr_t codes, int threads) const {
        auto* packed = const_cast<uint32_t*>(w_.codes);
        use_huge_pages(packed, w_.blocks() * w_.block_words() * 4);
        parallel_for(w_.blocks(), 4, useful_threads(w_, threads), [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) pack_block(w_, pointer<uint8_t>(codes), packed, b);
        });
    }

    void unpack(uintptr_t codes, int threads) const {
        parallel_for(w_.blocks(), 4, useful_threads(w_, threads), [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) unpack_block(w_, pointer<uint8_t>(codes), b);
        });
    }

    void product(uintptr_t x, uintptr_t y, uintptr_t bias, int batch, int dtype, int threads) const {
        const Kernels k = kernels();
        const auto type = static_cast<Dtype>(dtype);
        const int size = type == Dtype::f32 ? 4 : 2;
        const int64_t blocks = w_.blocks();
        threads = useful_threads(w_, threads);
        const int64_t grain = (blocks + threads - 1) / threads;
        for (int first = 0; first < batch; first += kMaxBatch) {
            const int n = batch - first < kMaxBatch ? batch - first : kMaxBatch;
            Product p{};
            const ProductFn run = prepare(k, w_, {pointer<char>(x) + int64_t(first) * w_.in * size, n, w_.in, type}, p);
            p.bias = pointer<float>(bias);
            p.y = pointer<char>(y) + int64_t(first) * w_.out * size;
            p.y_dtype = type;
            parallel_for(blocks, grain, threads, [&](int64_t begin, int64_t end) { run(w_, p, begin, end); });
        }
    }

    // Blocks [first, last) as columns of a matrix [in, stride]; dtype f32 or bf16.
    void dequantize(uintptr_t out, int64_t stride, int64_t first, int64_t last, int dtype, int threads) const {
        const Kernels k = kernels();
        const Tile t{pointer<void>(out), static_cast<Dtype>(dtype), stride, first, last};
        const int64_t count = last - first;
        parallel_for(count, 2, useful_threads(w_, threads),
                     [&](int64_t begin, int64_t end) { k.dequantize(w_, t, first + begin, first + end); });
    }

  private:
    Kernels kernels() const { return w_.code < kTable ? choose() : w_.code == kRowTable ? choose_row_tables() : choose_tables(); }

    Weight w_;
};

}  // namespace
}  // namespace fewbits::qlinear

namespace fewbits {

void bind_qlinear(nb::module_& m) {
    using qlinear::Packed;
    m.def("qlinear_isa", [] { return std::string(qlinear::choose().isa); });
    m.def("qlinear_words", [](int code, int64_t out, int64_t in, int64_t group) {
        qlinear::Weight w{};
        w.code = code, w.out = out, w.in = in, w.group = group, w.groups = (in + group - 1) / group;
        return w.blocks() * w.block_words();
    });
    using qlinear::Dtype;
    using qlinear::pointer;
    m.def("rms_norm", [](uintptr_t x, int64_t rows, int64_t size, int dtype, uintptr_t weight, uintptr_t out, float eps) {
        qlinear::rms_norm({pointer<void>(x), rows, size, static_cast<Dtype>(dtype)}, pointer<void>(weight), pointer<void>(out), eps);
    });
    m.def("rotate", [](uintptr_t x, int64_t rows, int64_t size, int dtype, uintptr_t cosines, uintptr_t sines) {
        qlinear::rotate({pointer<void>(x), rows, size, static_cast<Dtype>(dtype)}, pointer<void>(cosines), pointer<void>(sines));
    });
    nb::class_<Packed>(m, "QLinear")
        .def(nb::init<int, int64_t, int64_t, int64_t, nb::tuple, int>())
        .def("pack", &Packed::pack, nb::call_guard<nb::gil_scoped_release>())
        .def("unpack", &Packed::unpack, nb::call_guard<nb::gil_scoped_release>())
        .def("product", &Packed::product, nb::call_guard<nb::gil_scoped_release>())
        .def("dequantize", &Packed::dequantize, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace fewbits
