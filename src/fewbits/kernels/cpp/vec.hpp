// Vectors of one width per instruction set, in the compilers' own vector extension: one source, every CPU.
// Everything has internal linkage, so each file keeps code of its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace fewbits {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float vec __attribute__((vector_size(lanes * 4)));
typedef std::int32_t ivec __attribute__((vector_size(lanes * 4)));

inline vec load(const float *p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec splat(float x) { return x - vec{}; }
inline ivec isplat(std::int32_t x) { return x - ivec{}; }

inline vec vmin(vec a, vec b) { return a < b ? a : b; }
inline vec vmax(vec a, vec b) { return a > b ? a : b; }
inline vec clamp(vec x, vec low, vec high) { return vmin(vmax(x, low), high); }

inline ivec bits_of(vec v) { return reinterpret_cast<ivec>(v); }
inline vec as_float(ivec v) { return reinterpret_cast<vec>(v); }
inline vec vabs(vec v) { return as_float(bits_of(v) & isplat(0x7fffffff)); }

// Nearest integer, ties to even, for |x| < 2^22: the sum has no bits left for a fraction.
inline vec round_even(vec x) {
    const vec magic = splat(12582912.0f);
    return (x + magic) - magic;
}

}  // namespace
}  // namespace fewbits
