// What decoding does between products, for one token: a dozen calls of torch each, whose cost is that of calling.
// Every rounding is where transformers' modules have it.
#define FEWBITS_W 4
#include "qlinear_kernel.hpp"

#include <cmath>

namespace fewbits::qlinear {
namespace {

struct F32 {
    using Stored = float;
    static float load(float v) { return v; }
    static float store(float v) { return v; }
};
struct F16 {
    using Stored = uint16_t;
    static float load(uint16_t v) { return half_to_float(v); }
    static uint16_t store(float v) { return float_to_half(v); }
};
struct BF16 {
    using Stored = uint16_t;
    static float load(uint16_t v) {
        const uint32_t u = uint32_t(v) << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
    static uint16_t store(float v) { return float_to_bf16(v); }
};

template <class T>
float rounded(float v) {
    return T::load(T::store(v));
}

template <class T>
void normalize(const Rows& r, const void* weight, void* out, float eps) {
    const auto *x = static_cast<const typename T::Stored*>(r.x), *w = static_cast<const typename T::Stored*>(weight);
    auto* y = static_cast<typename T::Stored*>(out);
    for (int64_t row = 0; row < r.rows; ++row, x += r.size, y += r.size) {
        float sums[8] = {};
        for (int64_t i = 0; i < r.size; ++i) {
            const float v = T::load(x[i]);
            sums[i & 7] += v * v;
        }
        const float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        const float factor = 1.0f / std::sqrt(sum / float(r.size) + eps);
        for (int64_t i = 0; i < r.size; ++i) y[i] = T::store(rounded<T>(T::load(x[i]) * factor) * T::load(w[i]));
    }
}

template <class T>
void turn(const Rows& r, const void* cosines, const void* sines) {
    auto* x = static_cast<typename T::Stored*>(r.x);
    const auto *c = static_cast<const typename T::Stored*>(cosines), *s = static_cast<const typename T::Stored*>(sines);
    const int64_t half = r.size / 2;
    for (int64_t row = 0; row < r.rows; ++row, x += r.size) {
        for (int64_t i = 0; i < half; ++i) {
            const int64_t j = i + half;
            const float a = T::load(x[i]), b = T::load(x[j]);
            x[i] = T::store(rounded<T>(a * T::load(c[i])) + rounded<T>(b * T::load(s[i])));
            x[j] = T::store(rounded<T>(b * T::load(c[j])) + rounded<T>(a * T::load(s[j])));
        }
    }
}

}  // namespace

void rms_norm(const Rows& r, const void* weight, void* out, float eps) {
    if (r.dtype == Dtype::f32) normalize<F32>(r, weight, out, eps);
    else if (r.dtype == Dtype::f16) normalize<F16>(r, weight, out, eps);
    else normalize<BF16>(r, weight, out, eps);
}

void rotate(const Rows& r, const void* cosines, const void* sines) {
    if (r.dtype == Dtype::f32) turn<F32>(r, cosines, sines);
    else if (r.dtype == Dtype::f16) turn<F16>(r, cosines, sines);
    else turn<BF16>(r, cosines, sines);
}

}  // namespace fewbits::qlinear
