// Fake quantization to a uniform grid, included once per instruction set (fake_*.cpp).
//
// The gradient of a scale is a sum over its group: sixteen sums, of every sixteenth term, then those in order, whatever the
// vector width, so that all CPUs give the same bits. That needs -ffp-contract=off.
#pragma once

#include "fake.hpp"
#include "vec.hpp"

namespace fewbits {
namespace {

constexpr int terms = 16, parts = terms / lanes;

struct Uniform {
    vec s, z, qmin, qmax;

    // Steps from zero, before rounding. What lies far outside is clipped whether it is rounded or not.
    vec steps(vec w) const { return w / s; }
    vec rounded(vec u) const { return round_even(clamp(u, splat(-4096.0f), splat(4096.0f))) + z; }
};

// `count` values from p, and zeros after them.
inline void take(float *to, const float *p, std::int64_t count) {
    for (int k = 0; k < terms; ++k) to[k] = k < count ? p[k] : 0.0f;
}

inline void give(float *to, const float *p, std::int64_t count) {
    for (int k = 0; k < count; ++k) to[k] = p[k];
}

inline void fake16(const Uniform &q, const float *w, float *out) {
    for (int k = 0; k < terms; k += lanes) {
        const vec u = q.steps(load(w + k));
        const vec value = (clamp(q.rounded(u), q.qmin, q.qmax) - q.z) * q.s;
        store(out + k, u == u ? value : u);
    }
}

inline void back16(const Uniform &q, const float *w, const float *g, float *of_w, vec *sums) {
    for (int k = 0; k < terms; k += lanes) {
        const vec u = q.steps(load(w + k)), given = load(g + k), at = q.rounded(u), kept = clamp(at, q.qmin, q.qmax);
        const vec passed = at == kept ? given : vec{};
        store(of_w + k, passed);
        sums[k / lanes] += given * (kept - q.z) - passed * u;
    }
}

inline Uniform grid_of(const FakeJob &job, std::int64_t at) {
    return {splat(job.scale[at]), splat(job.zero[at]), splat(job.qmin), splat(job.qmax)};
}

void forward(const FakeJob &job, std::int64_t row_begin, std::int64_t row_end) {
    float in[terms], out[terms];
    for (std::int64_t r = row_begin; r < row_end; ++r) {
        for (std::int64_t k = 0; k < job.groups; ++k) {
            const Uniform q = grid_of(job, r * job.groups + k);
            const std::int64_t end = k + 1 < job.groups ? (k + 1) * job.group : job.columns;
            std::int64_t c = k * job.group;
            const float *w = job.w + r * job.columns;
            float *to = job.out + r * job.columns;
            for (; c + terms <= end; c += terms) fake16(q, w + c, to + c);
            if (c < end) {
                take(in, w + c, end - c);
                fake16(q, in, out);
                give(to + c, out, end - c);
            }
        }
    }
}

void backward(const FakeJob &job, std::int64_t row_begin, std::int64_t row_end) {
    float in[terms], given[terms], out[terms];
    for (std::int64_t r = row_begin; r < row_end; ++r) {
        for (std::int64_t k = 0; k < job.groups; ++k) {
            const std::int64_t at = r * job.groups + k;
            const Uniform q = grid_of(job, at);
            const std::int64_t end = k + 1 < job.groups ? (k + 1) * job.group : job.columns;
            std::int64_t c = k * job.group;
            const float *w = job.w + r * job.columns, *g = job.g + r * job.columns;
            float *to = job.out + r * job.columns;
            vec sums[parts] = {};
            for (; c + terms <= end; c += terms) back16(q, w + c, g + c, to + c, sums);
            if (c < end) {
                take(in, w + c, end - c);
                take(given, g + c, end - c);
                back16(q, in, given, out, sums);
                give(to + c, out, end - c);
            }
            for (int part = 0; part < parts; ++part) store(out + part * lanes, sums[part]);
            float sum = 0;
            for (float x : out) sum += x;
            job.of_scale[at] = sum;
        }
    }
}

}  // namespace
}  // namespace fewbits
