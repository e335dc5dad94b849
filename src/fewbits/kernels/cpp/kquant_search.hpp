// The four searches for a scale (and an offset) of n numbers, on eight such groups at once. Each returns real scales and
// integer codes; `w` are the weights of the squared error.
#pragma once

#include "kquant_lanes.hpp"

namespace fewbits {
namespace {

constexpr float nothing = 1e-15f;  // groups below this are all zero

struct Peak {
    V value, size;  // the element of largest magnitude, and that magnitude; the first of equals
};

template <int N>
inline Peak peak(const V *x) {
    Peak p = {V{}, V{}};
    for (int i = 0; i < N; ++i) {
        const V a = vabs8(x[i]);
        const I more = a > p.size;
        p.size = more ? a : p.size;
        p.value = more ? x[i] : p.value;
    }
    return p;
}

// Codes -top .. top-1 without offset (stored +top): the scale that maximises the projection (Σ w x l)² / Σ w l² among
// nineteen ways to stretch the grid.
template <int N>
inline V symmetric_scale(const V *x, const V *w, int top, I *code) {
    const Peak p = peak<N>(x);
    const I empty = p.size < vs(nothing);
    V best_inverse = vs(static_cast<float>(-top)) / p.value, scale = {}, best = {};
    for (int k = 0; k < 19; ++k) {
        const int step = k == 0 ? 0 : k <= 9 ? k - 10 : k - 9;  // 0, -9 .. -1, 1 .. 9
        const V inverse = step == 0 ? best_inverse : vs(-(static_cast<float>(top) + 0.1f * static_cast<float>(step))) / p.value;
        V xl = {}, ll = {};
        for (int i = 0; i < N; ++i) {
            const V l = real(clamp_int(nearest(inverse * x[i]), -top, top - 1));
            xl += w[i] * x[i] * l;
            ll += w[i] * l * l;
        }
        if (step == 0) {
            scale = ll != V{} ? xl / ll : V{};
            best = scale * xl;
            continue;
        }
        const I better = (ll > V{}) & (xl * xl > best * ll);
        scale = better ? xl / ll : scale;
        best = better ? scale * xl : best;
        best_inverse = better ? inverse : best_inverse;
    }
    for (int i = 0; i < N; ++i)
        code[i] = empty ? I{} : clamp_int(nearest(best_inverse * x[i]), -top, top - 1) + is(top);
    return empty ? V{} : scale;
}

// The same codes, chosen by at most five rounds of coordinate ascent on the same objective, with w = x².
template <int N>
inline V symmetric_ascent(const V *x, int top, I *code) {
    const Peak p = peak<N>(x);
    const I empty = p.size < vs(nothing);
    const V inverse = vs(static_cast<float>(-top)) / p.value;
    V l[N], xl = {}, ll = {};
    for (int i = 0; i < N; ++i) {
        const V w = x[i] * x[i];
        l[i] = real(clamp_int(nearest(inverse * x[i]), -top, top - 1));
        xl += w * x[i] * l[i];
        ll += w * l[i] * l[i];
    }
    for (int round = 0; round < 5; ++round) {
        I changed = {};
        for (int i = 0; i < N; ++i) {
            const V w = x[i] * x[i];
            V rest_xl = xl - w * x[i] * l[i], rest_ll = ll - w * l[i] * l[i];
            const I usable = rest_xl > V{};
            const V moved = real(clamp_int(nearest(x[i] * rest_ll / rest_xl), -top, top - 1));
            rest_xl += w * x[i] * moved;
            rest_ll += w * moved * moved;
            const I better = usable & (moved != l[i]) & (rest_ll > V{}) & (rest_xl * rest_xl * ll > xl * xl * rest_ll);
            l[i] = better ? moved : l[i];
            xl = better ? rest_xl : xl;
            ll = better ? rest_ll : ll;
            changed |= better;
        }
        if (!any(changed & ~empty)) break;
    }
    for (int i = 0; i < N; ++i) code[i] = empty ? I{} : trunc_int(l[i]) + is(top);
    return empty ? V{} : (ll > V{} ? xl / ll : V{});
}

struct Stretch {  // candidates of the affine search: (low + delta * k + top) levels for k = 0 .. steps
    float low, delta;
    int steps;
    bool absolute;  // weighted absolute instead of squared error
};

// Codes 0 .. top with a non-positive offset: weighted least squares for scale and offset at every stretch. An offset that
// is better becomes the lower end of the stretches that follow. `offset` is returned as a positive number to subtract.
template <int N>
inline V affine_scale(const V *x, const V *w, int top, const Stretch &s, I *code, V *offset) {
    V low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < N; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    low = low > V{} ? V{} : low;
    const I flat = high <= low;
    const auto error = [&](V a, V b, const V *l) {
        V sum = {};
        for (int i = 0; i < N; ++i) {
            const V diff = a * l[i] + b - x[i];
            sum += w[i] * (s.absolute ? vabs8(diff) : diff * diff);
        }
        return sum;
    };
    const float levels = static_cast<float>(top);
    V l[N], best_inverse = vs(levels) / (high - low), scale = vs(1.0f) / best_inverse, origin = low;
    for (int i = 0; i < N; ++i) l[i] = real(clamp_int(nearest(best_inverse * (x[i] - low)), 0, top));
    V best = error(scale, low, l);
    for (int k = 0; k <= s.steps; ++k) {
        const V inverse = vs(s.low + s.delta * static_cast<float>(k) + levels) / (high - low);
        V sl = {}, sll = {}, sxl = {};
        for (int i = 0; i < N; ++i) {
            l[i] = real(clamp_int(nearest(inverse * (x[i] - low)), 0, top));
            const V wl = w[i] * l[i];
            sl += wl;
            sll += wl * l[i];
            sxl += wl * x[i];
        }
        const V D = sum_w * sll - sl * sl;
        V a = (sum_w * sxl - sum_x * sl) / D, b = (sll * sum_x - sl * sxl) / D;
        const I above = b > V{};
        b = above ? V{} : b;
        a = above ? sxl / sll : a;
        const V e = error(a, b, l);
        const I better = (D > V{}) & (e < best);
        best = better ? e : best;
        scale = better ? a : scale;
        best_inverse = better ? inverse : best_inverse;
        origin = better ? low : origin;
        low = better & ~flat ? b : low;
    }
    for (int i = 0; i < N; ++i) code[i] = flat ? I{} : clamp_int(nearest(best_inverse * (x[i] - origin)), 0, top);
    *offset = -low;
    return flat ? V{} : scale;
}

// Codes 0 .. top of non-negative numbers (the scales of a super-block): nine stretches, then coordinate ascent.
template <int N>
inline V positive_scale(const V *x, const V *w, int top, I *code) {
    V high = {};
    for (int i = 0; i < N; ++i) high = high > x[i] ? high : x[i];
    const I empty = high < vs(nothing);
    const float levels = static_cast<float>(top);
    V inverse = vs(levels) / high, best = {};
    for (int k = 0; k < 9; ++k) {
        const int step = k == 0 ? 0 : k <= 4 ? k - 5 : k - 4;  // 0, -4 .. -1, 1 .. 4
        const V tried = step == 0 ? inverse : vs(0.1f * static_cast<float>(step) + levels) / high;
        const V size = vs(1.0f) / tried;
        V error = {};
        for (int i = 0; i < N; ++i) {
            const I n = nearest(tried * x[i]);
            const V diff = x[i] - size * real(step != 0 ? (n > is(top) ? is(top) : n) : n);
            error += w[i] * diff * diff;
        }
        const I better = step == 0 ? ~I{} : error < best;
        best = better ? error : best;
        inverse = better ? tried : inverse;
    }
    V l[N], xl = {}, ll = {};
    for (int i = 0; i < N; ++i) {
        const I n = nearest(inverse * x[i]);
        l[i] = real(n > is(top) ? is(top) : n);
        xl += w[i] * x[i] * l[i];
        ll += w[i] * l[i] * l[i];
    }
    for (int round = 0; round < 5; ++round) {
        I changed = {};
        for (int i = 0; i < N; ++i) {
            V rest_xl = xl - w[i] * x[i] * l[i], rest_ll = ll - w[i] * l[i] * l[i];
            const I usable = (rest_xl > V{}) & (rest_ll > V{});
            const I n = nearest(x[i] * rest_ll / rest_xl);
            const V moved = real(n > is(top) ? is(top) : n);
            rest_xl += w[i] * x[i] * moved;
            rest_ll += w[i] * moved * moved;
            const I better = usable & (moved != l[i]) & (rest_xl * rest_xl * ll > xl * xl * rest_ll);
            l[i] = better ? moved : l[i];
            xl = better ? rest_xl : xl;
            ll = better ? rest_ll : ll;
            changed |= better;
        }
        if (!any(changed & ~empty)) break;
    }
    for (int i = 0; i < N; ++i) code[i] = empty ? I{} : trunc_int(l[i]);
    return empty ? V{} : (ll > V{} ? xl / ll : V{});
}

// ---- tables ----------------------------------------------------------------------------------------------------------

constexpr float iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Nearest entry (the upper one of two as near): counting the midpoints that x reaches.
inline V table_value(V x) {
    V v = vs(iq4_values[0]);
    for (int k = 1; k < 16; ++k)
        v += x >= vs((iq4_values[k - 1] + iq4_values[k]) / 2) ? vs(iq4_values[k] - iq4_values[k - 1]) : V{};
    return v;
}
inline I table_index(V x) {
    I n = {};
    for (int k = 1; k < 16; ++k) n -= x >= vs((iq4_values[k - 1] + iq4_values[k]) / 2);
    return n;
}

// The scale for the table's values: the start and fifteen stretches, largest projection.
template <int N>
inline V table_scale(const V *x, const V *w) {
    const Peak p = peak<N>(x);
    V scale = {}, best = {};
    for (int k = 0; k < 16; ++k) {
        const V inverse = k == 0 ? vs(1.0f) / (-p.value / vs(iq4_values[0]))
                                 : vs(static_cast<float>(k - 8) + iq4_values[0]) / p.value;
        V qx = {}, qq = {};
        for (int i = 0; i < N; ++i) {
            const V v = table_value(inverse * x[i]), wv = w[i] * v;
            qx += wv * x[i];
            qq += wv * v;
        }
        const I better = k == 0 ? ~I{} : (qq > V{}) & (qx * qx > best * qq);
        scale = better ? (qq > V{} ? qx / qq : V{}) : scale;
        best = better ? scale * qx : best;
    }
    return p.size < vs(nothing) ? V{} : scale;
}

}  // namespace
}  // namespace fewbits
