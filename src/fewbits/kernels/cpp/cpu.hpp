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

const char *isa_name(Isa level);
bool parse_isa(const char *name, Isa *level);

}  // namespace fewbits
