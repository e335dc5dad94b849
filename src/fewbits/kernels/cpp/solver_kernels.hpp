// The solver's kernels, included once per instruction set (solver_*.cpp).
//
// Lanes hold candidates (fit) or rows (sweep), never terms of one sum: each result is computed by the same operations
// in the same order whatever the vector width, so all CPUs give the same bits. That needs -ffp-contract=off.
#pragma once

#include "solver.hpp"
#include "vec.hpp"

namespace fewbits {
namespace {

constexpr float smallest_normal = 1.17549435e-38f, smallest_half = 5.9604644775390625e-8f, largest_half = 65504.0f;
constexpr float largest_bfloat = 3.38953138925153547590e38f, largest_float = 3.40282346638528859812e38f;

inline vec drop_bits(vec x, int count) {
    const ivec b = bits_of(x);
    const ivec half = isplat((1 << (count - 1)) - 1);
    return as_float((b + half + ((b >> count) & isplat(1))) & isplat(-(1 << count)));
}

// Positive x in the stored dtype, ties to even; saturates at the largest finite value, never becomes zero.
inline vec store_scale(vec x, ScaleType type) {
    if (type == ScaleType::float16) {
        // Below 2^-14 halves are multiples of 2^-24, which is the spacing of floats in [0.5, 1).
        const vec subnormal = (x + splat(0.5f)) - splat(0.5f);
        const vec rounded = x < splat(6.103515625e-05f) ? subnormal : drop_bits(vmin(x, splat(largest_half)), 13);
        return clamp(rounded, splat(smallest_half), splat(largest_half));
    }
    if (type == ScaleType::bfloat16) return clamp(drop_bits(x, 16), splat(smallest_normal), splat(largest_bfloat));
    return clamp(x, splat(smallest_normal), splat(largest_float));
}

// x in float16, ties to even.
inline vec to_half(vec x) {
    const vec a = vabs(x);
    const vec subnormal = (a + splat(0.5f)) - splat(0.5f), normal = drop_bits(a, 13);
    const vec rounded = a < splat(6.103515625e-05f) ? subnormal : normal;
    const vec bounded = rounded > splat(largest_half) ? splat(__builtin_inff()) : rounded;
    return as_float(bits_of(bounded) | (bits_of(x) & isplat(INT32_MIN)));
}

// |d|^p for finite d: 2^(p log2|d|), relative error about 1e-6; 0 for d = 0.
inline vec power(vec d, float p) {
    const vec a = vmax(vabs(d), splat(1e-30f));
    const ivec shifted = bits_of(a) - isplat(0x3f3504f3);  // sqrt(1/2), so that m lies in [sqrt(1/2), sqrt(2))
    const ivec exponent = shifted >> 23;
    const vec m = as_float(bits_of(a) - (exponent << 23));
    const vec t = (m - splat(1.0f)) / (m + splat(1.0f)), t2 = t * t;
    // log2(m) = 2/ln2 * atanh(t) as a series in odd powers of t; |t| < 0.172 leaves 4e-9.
    vec s = splat(1.0f / 9) * t2 + splat(1.0f / 7);
    s = s * t2 + splat(1.0f / 5);
    s = s * t2 + splat(1.0f / 3);
    s = (s * t2 + splat(1.0f)) * t * splat(2.8853900817779268f);
    const vec y = clamp(splat(p) * (__builtin_convertvector(exponent, vec) + s), splat(-126.0f), splat(126.0f));
    const vec whole = round_even(y), f = (y - whole) * splat(0.69314718055994531f);
    vec e = splat(1.0f / 5040) * f + splat(1.0f / 720);  // e^f; |f| < 0.35 leaves 5e-9
    e = e * f + splat(1.0f / 120);
    e = e * f + splat(1.0f / 24);
    e = e * f + splat(1.0f / 6);
    e = e * f + splat(0.5f);
    e = e * f + splat(1.0f);
    e = e * f + splat(1.0f);
    return as_float(bits_of(e) + (__builtin_convertvector(whole, ivec) << 23));
}

struct Range {
    float low, high;  // low <= 0 <= high
};

inline Range range_of(const float *w, std::int64_t count) {
    vec low = {}, high = {};
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        low = vmin(load(w + i), low);
        high = vmax(load(w + i), high);
    }
    Range r = {0.0f, 0.0f};
    for (; i < count; ++i) {
        r.low = w[i] < r.low ? w[i] : r.low;
        r.high = w[i] > r.high ? w[i] : r.high;
    }
    for (int k = 0; k < lanes; ++k) {
        r.low = low[k] < r.low ? low[k] : r.low;
        r.high = high[k] > r.high ? high[k] : r.high;
    }
    return r;
}

struct Candidates {
    float scale[max_candidates], zero[max_candidates], error[max_candidates];
};

// Scales and zeros of `lanes` candidates from position k.
inline void propose(const FitJob &job, Range r, const float *low_ratio, const float *high_ratio, Candidates &c, int k) {
    const vec qmax = splat(job.qmax);
    vec scale, zero;
    if (job.symmetric) {
        const float most = -r.low > r.high ? -r.low : r.high;
        scale = store_scale(splat(2.0f * most) * load(high_ratio + k) / qmax, job.type);
        zero = splat((job.qmax + 1.0f) / 2.0f);
    } else {
        const vec low = splat(r.low) * load(low_ratio + k), high = splat(r.high) * load(high_ratio + k);
        scale = store_scale((high - low) / qmax, job.type);
        zero = round_even(clamp(-low / scale, vec{}, qmax));
    }
    store(c.scale + k, scale);
    store(c.zero + k, zero);
}

// Errors of 2 * lanes candidates over one group. Sums run over columns in order, in pieces of 64 to lose fewer bits.
template <bool Weighted, bool Square>
inline void measure(const FitJob &job, const float *w, const float *importance, std::int64_t count, Candidates &c,
                    int k) {
    const vec qmax = splat(job.qmax);
    const vec s0 = load(c.scale + k), s1 = load(c.scale + k + lanes);
    const vec z0 = load(c.zero + k), z1 = load(c.zero + k + lanes);
    // A reciprocal instead of a quotient can only move a weight that lies on a tie, where both codes err equally.
    const vec r0 = splat(1.0f) / s0, r1 = splat(1.0f) / s1;
    const vec low0 = -z0, low1 = -z1, high0 = qmax - z0, high1 = qmax - z1;
    vec total0 = {}, total1 = {};
    for (std::int64_t from = 0; from < count; from += 64) {
        const std::int64_t to = from + 64 < count ? from + 64 : count;
        vec sum0 = {}, sum1 = {};
        for (std::int64_t i = from; i < to; ++i) {
            const vec x = splat(w[i]);
            const vec d0 = x - round_even(clamp(x * r0, low0, high0)) * s0;
            const vec d1 = x - round_even(clamp(x * r1, low1, high1)) * s1;
            vec e0 = Square ? d0 * d0 : power(d0, job.norm);
            vec e1 = Square ? d1 * d1 : power(d1, job.norm);
            if (Weighted) {
                e0 *= splat(importance[i]);
                e1 *= splat(importance[i]);
            }
            sum0 += e0;
            sum1 += e1;
        }
        total0 += sum0;
        total1 += sum1;
    }
    store(c.error + k, total0);
    store(c.error + k + lanes, total1);
}

template <bool Weighted, bool Square>
void fit_groups(const FitJob &job, std::int64_t begin, std::int64_t end) {
    constexpr int step = 2 * lanes;
    const int padded = (job.candidates + step - 1) / step * step;
    alignas(64) float low_ratio[max_candidates], high_ratio[max_candidates];
    for (int k = 0; k < padded; ++k) {
        // Copies of the last candidate never win: only a strictly smaller error does.
        const int source = k < job.candidates ? k : job.candidates - 1;
        low_ratio[k] = job.ratios[2 * source];
        high_ratio[k] = job.ratios[2 * source + 1];
    }
    alignas(64) Candidates c;
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t row = item / job.groups, first = item % job.groups * job.group;
        const std::int64_t rest = job.columns - first, count = rest < job.group ? rest : job.group;
        const float *w = job.w + row * job.columns + first;
        const Range r = range_of(w, count);
        int best = 0;
        for (int k = 0; k < padded; k += lanes) propose(job, r, low_ratio, high_ratio, c, k);
        if (job.candidates > 1) {
            for (int k = 0; k < padded; k += step) {
                measure<Weighted, Square>(job, w, Weighted ? job.importance + first : nullptr, count, c, k);
            }
            for (int k = 1; k < job.candidates; ++k) best = c.error[k] < c.error[best] ? k : best;
        }
        const bool empty = r.low == 0.0f && r.high == 0.0f;
        job.scale[item] = empty ? 1.0f : c.scale[best];
        job.zero[item] = c.zero[best] + 0.0f;  // no negative zero
    }
}

void fit(const FitJob &job, std::int64_t begin, std::int64_t end) {
    const bool weighted = job.importance != nullptr, square = job.norm == 2.0f;
    if (weighted && square) fit_groups<true, true>(job, begin, end);
    else if (weighted) fit_groups<true, false>(job, begin, end);
    else if (square) fit_groups<false, true>(job, begin, end);
    else fit_groups<false, false>(job, begin, end);
}

// One tile of `lanes` rows, transposed: w[j] is a vector over rows.
struct SweepTile {
    vec w[max_block], error[max_block], code[max_block], kept[max_block];
};

template <bool Kept>
inline void sweep_tile(const SweepJob &job, SweepTile &t, const float *scale, const float *zero) {
    const vec qmax = splat(job.qmax), limit = splat(job.limit);
    for (int j = 0; j < job.block; ++j) {
        const vec s = load(scale + job.segment[j] * lanes), z = load(zero + job.segment[j] * lanes);
        // Far outside the codes, and inside what round_even takes.
        const vec place = Kept ? t.w[j] / s + z : t.w[j] / s;
        const vec bounded = clamp(place, splat(-4096.0f), splat(4096.0f));
        const vec code = clamp(Kept ? round_even(bounded) : round_even(bounded) + z, vec{}, qmax);
        const float *u = job.u + j * job.u_stride;
        const vec left = t.w[j] - s * (code - z);
        vec e = left / splat(u[j]);
        if (Kept) {
            t.kept[j] = e * e > limit ? to_half(left) : vec{};
            e = (left - t.kept[j]) / splat(u[j]);
        }
        t.code[j] = code;
        t.error[j] = e;
        for (int k = j + 1; k < job.block; ++k) t.w[k] -= e * splat(u[k]);
    }
}

constexpr int segments_at_once = 256;

void sweep(const SweepJob &job, std::int64_t row_begin, std::int64_t row_end) {
    alignas(64) static thread_local SweepTile t;
    alignas(64) float scale[segments_at_once * lanes], zero[segments_at_once * lanes];
    for (std::int64_t row = row_begin; row < row_end; row += lanes) {
        const int count = static_cast<int>(row_end - row < lanes ? row_end - row : lanes);
        for (int lane = 0; lane < lanes; ++lane) {
            const std::int64_t source = row + (lane < count ? lane : 0);  // spare lanes repeat a row, unread
            const float *w = job.w + source * job.w_stride;
            for (int j = 0; j < job.block; ++j) reinterpret_cast<float *>(&t.w[j])[lane] = w[j];
            for (int g = 0; g < job.segments; ++g) {
                scale[g * lanes + lane] = job.scale[source * job.segments + g];
                zero[g * lanes + lane] = job.zero[source * job.segments + g];
            }
        }
        if (job.kept) sweep_tile<true>(job, t, scale, zero);
        else sweep_tile<false>(job, t, scale, zero);
        for (int lane = 0; lane < count; ++lane) {
            const std::int64_t target = row + lane;
            for (int j = 0; j < job.block; ++j) {
                job.w[target * job.w_stride + j] = reinterpret_cast<const float *>(&t.w[j])[lane];
                job.error[target * job.block + j] = reinterpret_cast<const float *>(&t.error[j])[lane];
                if (job.kept) job.kept[target * job.block + j] = reinterpret_cast<const float *>(&t.kept[j])[lane];
                job.codes[target * job.block + j] =
                    static_cast<std::uint8_t>(reinterpret_cast<const float *>(&t.code[j])[lane]);
            }
        }
    }
}

}  // namespace
}  // namespace fewbits
