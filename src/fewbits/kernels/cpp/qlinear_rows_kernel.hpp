// Products with a weight that has a table for each row (kRowTable), once per instruction set like qlinear_kernel.hpp. One shift
// brings W codes out of their lanes, a permutation looks them up, and columns of x are multiplied where they lie.
#include "qlinear_kernel.hpp"

namespace fewbits::qlinear {
namespace {

constexpr int C = kRowUnit / kRows;

// A row's table; of a lane, the four bits from `shift` on are looked up.
struct RowTable {
    float values[kRows];
#if FEWBITS_W >= 8
    vf low, high;
#endif

    FEWBITS_INLINE explicit RowTable(const uint16_t* halves) {
        for (int i = 0; i < kRows; i += W) store(values + i, load_halves(halves + i));
#if FEWBITS_W >= 8
        low = load<vf>(values), high = load<vf>(values + kRows - W);
#endif
    }

    FEWBITS_INLINE vf operator()(vu word, int shift) const {
#if FEWBITS_W == 16
        return (vf)_mm512_permutexvar_ps((__m512i)(word >> shift), (__m512)low);  // reads 4 bits
#elif FEWBITS_W == 8
        const __m256i code = (__m256i)(word >> shift);  // permutations read 3 bits, the selection the sign bit
        const __m256 a = _mm256_permutevar8x32_ps((__m256)low, code), b = _mm256_permutevar8x32_ps((__m256)high, code);
        return (vf)_mm256_blendv_ps(a, b, (__m256)(word << (28 - shift)));
#else
        vf v;
        for (int i = 0; i < W; i++) v[i] = values[(word[i] >> shift) & 15];
        return v;
#endif
    }
};

FEWBITS_INLINE float total_of(vf v) {
    float parts[W];
    store(parts, v);
    for (int step = W / 2; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}

template <int M>
void row_table_blocks(const Weight& w, const Product& p, int64_t first, int64_t last) {
    constexpr int N = M == 1 ? 4 : M <= 3 ? 2 : 1;  // N independent sums hide the latency
    const auto* tables = (const uint16_t*)w.scale;
    const int64_t units = w.units(), padded = w.padded();
    const uint32_t* codes = w.codes + first * w.block_words();
    for (int64_t b = first; b < last; b++) {
        float sums[M][kRows];
        for (int r = 0; r < kRows; r++) {
            const RowTable table(tables + (b * kRows + r) * kRows);
            const float* x = (const float*)p.x;
            vf part[N][M] = {};
            for (int64_t u = 0; u < units; u++, x += kRowUnit) {
                __builtin_prefetch(codes + 1024);
                for (int h = 0; h < H; h++, codes += W) {
                    const vu word = load<vu>(codes);
#pragma GCC unroll 8
                    for (int k = 0; k < C; k++) {
                        const vf q = table(word, 4 * k);
#pragma GCC unroll 8
                        for (int m = 0; m < M; m++) part[k % N][m] = fma(q, load<vf>(x + m * padded + k * kRows + h * W), part[k % N][m]);
                    }
                }
            }
            for (int m = 0; m < M; m++) {
                vf sum = part[0][m];
                for (int n = 1; n < N; n++) sum += part[n][m];
                sums[m][r] = total_of(sum);
            }
        }
        for (int m = 0; m < M; m++) emit(w, p, b, m, sums[m]);
    }
}

void product_row_table(const Weight& w, const Product& p, int64_t first, int64_t last) {
    static constexpr ProductFn by_batch[] = {row_table_blocks<1>, row_table_blocks<2>, row_table_blocks<3>, row_table_blocks<4>,
                                             row_table_blocks<5>, row_table_blocks<6>, row_table_blocks<7>, row_table_blocks<8>};
    by_batch[p.batch - 1](w, p, first, last);
}

// A unit of 16 rows at a time, turned so that the rows of a column lie together.
void dequantize_row_table(const Weight& w, const Tile& t, int64_t first, int64_t last) {
    const auto* tables = (const uint16_t*)w.scale;
    const int64_t row_words = w.units() * kRows;
    float values[kRows][kRowUnit];
    for (int64_t b = first; b < last; b++) {
        for (int64_t u = 0; u < w.units(); u++) {
            for (int r = 0; r < kRows; r++) {
                const RowTable table(tables + (b * kRows + r) * kRows);
                const uint32_t* words = w.codes + b * w.block_words() + r * row_words + u * kRows;
                for (int h = 0; h < H; h++)
                    for (int k = 0; k < C; k++) store(values[r] + k * kRows + h * W, table(load<vu>(words + h * W), 4 * k));
            }
            const int64_t left = w.in - u * kRowUnit, count = left < kRowUnit ? left : kRowUnit;
            for (int64_t c = 0; c < count; c++) {
                const int64_t at = (u * kRowUnit + c) * t.stride + (b - t.first) * kRows;
                for (int r = 0; r < kRows; r++) {
                    if (t.dtype == Dtype::f32) ((float*)t.out)[at + r] = values[r][c];
                    else ((uint16_t*)t.out)[at + r] = float_to_bf16(values[r][c]);
                }
            }
        }
    }
}

}  // namespace
}  // namespace fewbits::qlinear
