// Which instruction sets this machine has, and which the kernels may use.
#pragma once

namespace fewbits {

// Ordered: a level includes all below it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// avx2: AVX2, FMA, F16C. avx512: F, BW, DQ, VL, VNNI. amx: AVX512-BF16 and AMX tiles with bf16 and int8, granted by
// the OS.
Isa detected_isa();

// The level in use: the detected one, unless lowered by limit_isa or the environment variable FEWBITS_ISA.
Isa isa();
void limit_isa(Isa most);

// The kernels for this CPU, of functions that give those of each level; null where there are none, and the level below serves.
// FEWBITS_AVX2(f) and FEWBITS_AVX512(f) are f, or null where the compiler could not build these files.
#if defined(FEWBITS_WITH_AVX2)
#define FEWBITS_AVX2(f) (&f)
#else
#define FEWBITS_AVX2(f) (static_cast<decltype(&f)>(nullptr))
#endif
#if defined(FEWBITS_WITH_AVX512)
#define FEWBITS_AVX512(f) (&f)
#else
#define FEWBITS_AVX512(f) (static_cast<decltype(&f)>(nullptr))
#endif

template <class Kernels>
Kernels best_kernels(Kernels (*portable)(), Kernels (*avx2)(), Kernels (*avx512)()) {
    if (avx512 && isa() >= Isa::avx512) return avx512();
    return avx2 && isa() >= Isa::avx2 ? avx2() : portable();
}

const char *isa_name(Isa level);
bool parse_isa(const char *name, Isa *level);

}  // namespace fewbits
