// Rounding a run of floats to whole multiples of its largest magnitude / `most`; included once per instruction set.
#pragma once

#include <cstring>

#include "vec.hpp"

namespace fewbits {
namespace {

constexpr int ahead = 4;  // rows to fetch in advance: they are far apart, and the processor does not foresee the next

// Fetches the row that comes `ahead` rows after this one, if there is one.
inline void fetch_ahead(const float *row, std::int64_t stride, int left, int depth) {
    if (left <= ahead) return;
    for (int k = 0; k < depth; k += 16) __builtin_prefetch(row + ahead * stride + k);
}

inline ivec magnitude(vec x) { return bits_of(x) & isplat(0x7fffffff); }
inline ivec imax(ivec a, ivec b) { return a > b ? a : b; }

// Scale of a run whose largest magnitude has these bits, and its reciprocal. NaN and infinity make the scale NaN and
// the codes zero: whatever is multiplied by them becomes NaN. Below 1e-30 the reciprocal is not safe: such runs are zero.
inline void scale_of(std::int32_t largest, int most, float *scale, float *reciprocal) {
    float top;
    std::memcpy(&top, &largest, sizeof top);
    if (largest >= 0x7f800000) {
        *scale = __builtin_nanf(""), *reciprocal = 0.0f;
    } else if (top < 1e-30f) {
        *scale = 0.0f, *reciprocal = 0.0f;
    } else {
        *scale = top / most, *reciprocal = most / top;
    }
}

inline void scale_of(ivec largest, int most, float *scale, float *reciprocal) {
    std::int32_t top = 0;
    for (int l = 0; l < lanes; ++l) top = largest[l] > top ? largest[l] : top;
    scale_of(top, most, scale, reciprocal);
}

// Codes of one vector, ties to even. NaN and infinity count as 0 here: the scale of their run is NaN already.
inline ivec codes_of(vec x, vec reciprocal) {
    const ivec finite = magnitude(x) < isplat(0x7f800000);
    const vec magic = splat(12582912.0f);  // the sum has no bits left for a fraction
    return bits_of(as_float(bits_of(x) & finite) * reciprocal + magic) - bits_of(magic);
}

}  // namespace
}  // namespace fewbits
