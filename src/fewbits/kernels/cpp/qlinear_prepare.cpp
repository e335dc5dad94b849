#include "qlinear_prepare.hpp"

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace fewbits::qlinear {
namespace {

float to_float(const void* x, Dtype dtype, int64_t i) {
    uint32_t u;
    float f;
    if (dtype == Dtype::f32) return static_cast<const float*>(x)[i];
    const uint32_t h = static_cast<const uint16_t*>(x)[i];
    if (dtype == Dtype::bf16) {
        u = h << 16;
        std::memcpy(&f, &u, 4);
        return f;
    }
    u = (h & 0x7fff) << 13;
    std::memcpy(&f, &u, 4);
    f *= 0x1p112f;
    std::memcpy(&u, &f, 4);
    u |= ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u) | (h & 0x8000) << 16;
    std::memcpy(&f, &u, 4);
    return f;
}

struct Scratch {
    std::vector<float> x, sums, steps;
    std::vector<uint32_t> pairs, low;
    std::vector<int32_t> start;
};

Scratch& scratch() {
    thread_local Scratch s;
    return s;
}

// Place of column j of a table's unit, of row m among `batch`, in the order of bytes in its lane: columns 0, 4, 1, 5 of every
// row, then columns 2, 6, 3, 7.
inline int64_t place_quad(int64_t j, int64_t m, int64_t batch) {
    return ((j & 7) / 2 % 2 * batch + m) * 4 + 2 * (j & 1) + ((j >> 2) & 1) + (j & ~int64_t(7)) * batch;
}

// x [batch][in] becomes float32 [padded][batch], each column divided by 2**shift of its code (exact: a power of two), so that
// kernels mask codes and need not shift them. Sums of each group are taken here, in float32, column after column.
void prepare_floats(const Weight& w, const void* x, Dtype dtype, int batch, bool quads, Scratch& s) {
    const int unit = unit_columns(w.code), top = w.bits == 8 ? 24 : w.bits == 4 ? 28 : 30;
    float by[32];
    for (int j = 0; j < unit; ++j) {
        by[j] = gain_of(w.code);
        for (int i = 0; w.code < kTable && step_of(w.bits, j) != top && i < step_of(w.bits, j); ++i) by[j] *= 0.5f;
    }
    s.x.assign(size_t(w.padded() * batch), 0.0f);
    s.sums.assign(size_t(w.groups * batch), 0.0f);
    for (int64_t g = 0; g < w.groups; ++g) {
        float* at = s.x.data() + g * w.units_of(0) * unit * batch;
        const int64_t columns = w.columns_of(g);
        for (int m = 0; m < batch; ++m) {
            float sum[4] = {};
            for (int64_t c = 0; c < columns; ++c) {
                const int64_t column = g * w.group + c;
                const float v = to_float(x, dtype, m * w.in + (w.order ? w.order[column] : column));
                sum[c & 3] += v;
                at[quads ? place_quad(c, m, batch) : c * batch + m] = v * by[c & (unit - 1)];
            }
            s.sums[size_t(g * batch + m)] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
    }
}

// The same for bfloat16 kernels: pairs of columns [padded / 2][batch], unscaled. Returns x itself when it has this form already.
const void* prepare_pairs(const Weight& w, const uint16_t* x, int batch, Scratch& s) {
    const int unit = unit_columns(w.code);
    s.sums.assign(size_t(w.groups * batch), 0.0f);
    const bool as_is = batch == 1 && w.straight() && w.padded() == w.in;
    if (!as_is) s.pairs.assign(size_t(w.padded() / 2 * batch), 0);
    auto* pairs = reinterpret_cast<uint16_t*>(s.pairs.data());
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t columns = w.columns_of(g), start = g * w.units_of(0) * unit;
        for (int m = 0; m < batch; ++m) {
            float sum[4] = {};
            for (int64_t c = 0; c < columns; ++c) {
                const int64_t column = g * w.group + c, from = m * w.in + (w.order ? w.order[column] : column);
                sum[c & 3] += to_float(x, Dtype::bf16, from);
                if (!as_is) pairs[((start + c) / 2 * batch + m) * 2 + ((start + c) & 1)] = x[from];
            }
            s.sums[size_t(g * batch + m)] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
    }
    return as_is ? static_cast<const void*>(x) : s.pairs.data();
}


// `count` columns of one row of x, from packed column `first` on, as float32.
void gather(const Weight& w, const Rows& x, int64_t row, int64_t first, int64_t count, float* out) {
    const int64_t start = row * x.size;
    if (w.order) {
        for (int64_t c = 0; c < count; ++c) out[c] = to_float(x.x, x.dtype, start + w.order[first + c]);
    } else if (x.dtype == Dtype::f32) {
        std::memcpy(out, static_cast<const float*>(x.x) + start + first, size_t(count) * 4);
    } else if (x.dtype == Dtype::bf16) {
        for (int64_t c = 0; c < count; ++c) out[c] = to_float(x.x, Dtype::bf16, start + first + c);
    } else {
        for (int64_t c = 0; c < count; ++c) out[c] = to_float(x.x, Dtype::f16, start + first + c);
    }
}

// What one row of one chunk became: value = (high + low * 2**-15) * step.
struct Chunk {
    float values[kChunk];
    int16_t high[kChunk], low[kChunk];
    float step, high_sum, low_sum;
    bool coarse;  // high parts alone would lose more than the rounding of x's own dtype does
};

// The nearest integer, ties to even, of |v| < 2**22.
inline float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

// Splits `count` values into high parts below 2**bits and low parts; the rest of the chunk becomes 0. False when they are no
// fixed-point numbers: infinite, NaN, all tiny.
bool split(Chunk& c, int64_t count, Dtype dtype, int bits) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t u;
        std::memcpy(&u, c.values + i, 4);
        u &= 0x7fffffff;
        most = u > most ? u : most;
    }
    const int exponent = (most >> 23) - 126;  // the largest magnitude is below 2**exponent
    if (most != 0 && (exponent < -60 || exponent > 100)) return false;
    c.step = most == 0 ? 1.0f : std::ldexp(1.0f, exponent - bits);
    const float by = 1.0f / c.step, low_by = 1.0f / kLowStep, top = float((1 << bits) - 1);
    float lost = 0.0f, total = 0.0f;
    int32_t high_sum = 0, low_sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float v = c.values[i] * by, h = nearest(v) > top ? top : nearest(v);  // by: a power of two, exact
        const float l = nearest((v - h) * low_by) > 32767.0f ? 32767.0f : nearest((v - h) * low_by);
        c.high[i] = int16_t(int32_t(h));
        c.low[i] = int16_t(int32_t(l));
        high_sum += int32_t(h);
        low_sum += int32_t(l);
        lost += std::fabs(v - h);
        total += std::fabs(v);
    }
    for (int64_t i = count; i < kChunk; ++i) c.high[i] = c.low[i] = 0;
    c.high_sum = float(high_sum), c.low_sum = float(low_sum);
    const float roundoff = dtype == Dtype::bf16 ? 0x1p-9f : dtype == Dtype::f16 ? 0x1p-11f : 0x1p-24f;
    float largest;
    std::memcpy(&largest, &most, 4);
    c.coarse = lost > (total - largest * by) * (roundoff / 2);  // without the largest: it may meet a zero weight
    return true;
}

// Place of column j among the int16 of its unit and row: kernels take bytes of 8-bit units as columns 0, 2, 1, 3.
inline int64_t place(int bits, int64_t j) { return bits == 8 ? (j & ~int64_t(3)) + 2 * (j & 1) + ((j >> 1) & 1) : j; }

// x as fixed-point numbers: pairs of int16 [padded / 2][batch], steps [chunks][batch]. A low part is kept unless every chunk
// loses less than half of the rounding of x's dtype without (in the sum of all but the largest). False when x needs floats.
bool prepare_fixed(const Weight& w, const Rows& x, Scratch& s, Product& p) {
    const int64_t batch = x.rows, words = w.padded() / 2 * batch;
    s.pairs.resize(size_t(words));
    s.low.resize(size_t(words));
    s.sums.assign(size_t(w.groups * batch), 0.0f);
    s.steps.resize(size_t(w.chunks() * batch));
    auto* high = reinterpret_cast<int16_t*>(s.pairs.data());
    auto* low = reinterpret_cast<int16_t*>(s.low.data());
    bool coarse = false;
    std::vector<float> low_sums(size_t(w.groups * batch), 0.0f);
    Chunk c;
    for (int64_t g = 0, chunk = 0; g < w.groups; ++g) {
        const int64_t columns = w.columns_of(g), start = g * w.units_of(0) * unit_columns(w.code);
        const int64_t padded = w.units_of(g) * unit_columns(w.code);
        for (int64_t at = 0; at < columns; at += kChunk, ++chunk) {
            const int64_t count = columns - at < kChunk ? columns - at : kChunk;
            const int64_t room = padded - at < kChunk ? padded - at : kChunk;
            for (int64_t m = 0; m < batch; ++m) {
                gather(w, x, m, g * w.group + at, count, c.values);
                if (!split(c, count, x.dtype, 15)) return false;
                s.steps[size_t(chunk * batch + m)] = c.step;
                s.sums[size_t(g * batch + m)] += c.high_sum * c.step;
                low_sums[size_t(g * batch + m)] += c.low_sum * (c.step * kLowStep);
                coarse |= c.coarse;
                for (int64_t j = 0; j < room; ++j) {
                    const int64_t to = start + at + place(w.bits, j), index = (to / 2 * batch + m) * 2 + (to & 1);
                    high[index] = c.high[j];
                    low[index] = c.low[j];
                }
            }
        }
    }
    if (coarse) {
        for (size_t i = 0; i < low_sums.size(); ++i) s.sums[i] += low_sums[i];
    }
    p.x = s.pairs.data();
    p.low = coarse ? s.low.data() : nullptr;
    p.steps = s.steps.data();
    return true;
}

// Splits every span of every row of x for a table into numbers below 2**14, and says whether low parts are needed (as in
// prepare_fixed). Then visit(place of 8 columns among [units][batch][8], j, the chunk's number, high and low part) for each
// column. False when x needs floats.
template <class Visit>
bool each_column(const Weight& w, const Rows& x, Scratch& s, bool* coarse, const Visit& visit) {
    const int64_t full = w.units_of(0);
    Chunk c;
    *coarse = false;
    s.steps.resize(size_t(w.spans() * x.rows));
    for (int64_t m = 0; m < x.rows; ++m) {
        for (int64_t first = 0, span = 0, chunk = 0, g = 0, at = 0; first < w.in; ++span) {
            // `at` columns of group g lie before this span.
            const int64_t left = w.group < kChunk ? w.span() * w.group : w.group - at, rest = w.in - first;
            int64_t count = left < kChunk ? left : kChunk;
            count = count < rest ? count : rest;
            gather(w, x, m, first, count, c.values);
            if (!split(c, count, x.dtype, 14)) return false;
            s.steps[size_t(span * x.rows + m)] = c.step * w.ints.step;
            *coarse |= c.coarse;
            for (int64_t i = 0; i < count; ++i) {
                visit(((g * full + at / 8) * x.rows + m) * 8, at & 7, chunk * x.rows + m, c.high[i], c.low[i]);
                if (++at == w.group) at = 0, ++g;
                if (at % kChunk == 0) ++chunk;
            }
            first += count;
        }
    }
    return true;
}

// x for small tables: two bytes a number, 256 * high + low, both signed; of a unit and row 16 bytes: the high ones in the order
// of place_quad, then the low ones.
bool prepare_small(const Weight& w, const Rows& x, Scratch& s, Product& p) {
    const int64_t sums = w.chunks() * x.rows;
    for (auto* part : {&s.pairs, &s.low}) part->assign(size_t(w.padded() / 2 * x.rows), 0);
    s.start.assign(size_t(2 * sums), 0);
    auto *high = reinterpret_cast<int8_t*>(s.pairs.data()), *low = reinterpret_cast<int8_t*>(s.low.data());
    bool coarse;
    const bool all = each_column(w, x, s, &coarse, [&](int64_t unit, int64_t j, int64_t chunk, int h, int l) {
        const int64_t to = 2 * unit + place_quad(j, 0, 1);
        high[to] = int8_t((h + 128) >> 8), high[to + 8] = int8_t(h);
        low[to] = int8_t((l + 128) >> 8), low[to + 8] = int8_t(l);
        s.start[size_t(chunk)] -= w.ints.offset * h;
        s.start[size_t(sums + chunk)] -= w.ints.offset * l;
    });
    p.x = s.pairs.data();
    p.low = coarse ? s.low.data() : nullptr;
    p.steps = s.steps.data();
    p.start = s.start.data();
    p.low_start = s.start.data() + sums;
    return all;
}

// x for tables in 16 bits: int16 [units][batch][8] in the order of place_quad. False also where x needs low parts.
bool prepare_wide(const Weight& w, const Rows& x, Scratch& s, Product& p) {
    s.pairs.assign(size_t(w.padded() / 2 * x.rows), 0);
    auto* out = reinterpret_cast<int16_t*>(s.pairs.data());
    bool coarse;
    const bool all = each_column(w, x, s, &coarse, [&](int64_t unit, int64_t j, int64_t, int h, int) {
        out[unit + place_quad(j, 0, 1)] = int16_t(h);
    });
    p.x = s.pairs.data();
    p.steps = s.steps.data();
    return all && !coarse;
}

// Place of column j of a unit among int16 values, as the AVX2 product meets them: bytes of a vector of lanes are looked up, low and
// high halves of a byte apart, and widened in the lower and in the upper half of each 128 bits.
inline int place_in_row(int j) {
    const int lane = j % kRows, k = j / kRows, vector = lane / 8, l = lane % 8;
    return ((vector * 2 + k % 2) * 2 + l % 4 / 2) * 16 + l / 4 * 8 + l % 2 * 4 + k / 2;
}

// The same for float32: four columns of a lane lie together.
inline int place_in_quads(int j) {
    const int lane = j % kRows, k = j / kRows, vector = lane / 8, l = lane % 8;
    return ((vector * 2 + k % 2) * 4 + l % 4) * 8 + l / 4 * 4 + k / 2;
}

// x for kRowTable: int16 [units][batch][128] of numbers below 2**14 where 16-bit x loses little by it (see prepare_fixed), else float32:
// up to k.quads rows [units][batch][128] in the order of place_in_quads, more [batch][padded].
ProductFn prepare_row_table(const Kernels& k, const Weight& w, const Rows& x, Scratch& s, Product& p) {
    const int64_t units = w.units();
    bool fixed = k.product_wide && x.rows <= k.few && x.dtype != Dtype::f32;
    if (fixed) {
        s.pairs.assign(size_t(w.padded() / 2 * x.rows), 0);
        s.steps.resize(size_t(units * x.rows));
        auto* out = reinterpret_cast<int16_t*>(s.pairs.data());
        int place[kRowUnit];
        for (int j = 0; j < kRowUnit; ++j) place[j] = place_in_row(j);
        Chunk c;
        for (int64_t at = 0; fixed && at < units * x.rows; ++at) {
            const int64_t first = at / x.rows * kRowUnit, left = w.in - first, count = left < kRowUnit ? left : kRowUnit;
            gather(w, x, at % x.rows, first, count, c.values);
            fixed = split(c, count, x.dtype, 14) && !c.coarse;
            s.steps[size_t(at)] = c.step;
            for (int64_t j = 0; j < count; ++j) out[at * kRowUnit + place[j]] = c.high[j];
        }
        p.x = s.pairs.data();
        p.steps = s.steps.data();
        if (fixed) return k.product_wide;
    }
    s.x.assign(size_t(w.padded() * x.rows), 0.0f);
    const bool quads = x.rows <= k.quads;
    for (int64_t m = 0; !quads && m < x.rows; ++m) gather(w, x, m, 0, w.in, s.x.data() + m * w.padded());
    for (int64_t at = 0; quads && at < units * x.rows; ++at) {
        const int64_t first = at / x.rows * kRowUnit, left = w.in - first, count = left < kRowUnit ? left : kRowUnit;
        float values[kRowUnit];
        gather(w, x, at % x.rows, first, count, values);
        for (int j = 0; j < count; ++j) s.x[size_t(at * kRowUnit + place_in_quads(j))] = values[j];
    }
    p.x = s.x.data();
    return k.product;
}

ProductFn prepare_table(const Kernels& k, const Weight& w, const Rows& x, Scratch& s, Product& p) {
    if (p.batch > k.few) return nullptr;
    if (w.ints.small) return prepare_small(w, x, s, p) ? k.product_small : nullptr;
    return x.dtype != Dtype::f32 && prepare_wide(w, x, s, p) ? k.product_wide : nullptr;
}

}  // namespace

ProductFn prepare(const Kernels& k, const Weight& w, const Rows& x, Product& p) {
    Scratch& s = scratch();
    p.batch = int(x.rows);
    if (w.code == kRowTable) return prepare_row_table(k, w, x, s, p);
    ProductFn run = w.code == kTable ? prepare_table(k, w, x, s, p) : nullptr;
    if (run) return run;
    run = k.product;
    if (x.dtype == Dtype::bf16 && k.product_bf16 && w.code < 8) {
        p.x = prepare_pairs(w, static_cast<const uint16_t*>(x.x), p.batch, s);
        run = k.product_bf16;
    } else if (k.product_fixed && prepare_fixed(w, x, s, p)) {
        run = k.product_fixed;
    } else {
        prepare_floats(w, x.x, x.dtype, p.batch, w.code == kTable && p.batch <= k.quads, s);
        p.x = s.x.data();
    }
    p.sums = s.sums.data();
    return run;
}

IntTable int_table(const float* table) {
    float values[16], least = 0.0f, most = 0.0f;
    for (int i = 0; i < 16; ++i) {
        values[i] = std::isfinite(table[i]) ? table[i] : 0.0f;  // others belong to codes that no weight has
        const float size = std::fabs(values[i]);
        most = size > most ? size : most;
        if (size > 0.0f && (least == 0.0f || size < least)) least = size;
    }
    IntTable t{};
    t.step = most == 0.0f ? 1.0f : least;
    t.small = most <= kSmall * t.step;
    int low = 0, high = 0;
    for (int i = 0; i < 16 && t.small; ++i) {
        const float n = nearest(values[i] / t.step);
        t.small = std::fabs(values[i] - n * t.step) <= 0x1p-22f * std::fabs(values[i]);  // values may have been rounded
        low = int(n) < low ? int(n) : low;
        high = int(n) > high ? int(n) : high;
    }
    t.small = t.small && high - low <= kSmall;
    t.offset = t.small ? -low : 0;
    if (!t.small) t.step = most / kWide;
    for (int i = 0; i < 16; ++i) t.value[i] = int16_t(nearest(values[i] / t.step));
    return t;
}

}  // namespace fewbits::qlinear
