#include "cpu.hpp"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fewbits {
namespace {

#if defined(__x86_64__)
unsigned long long extended_control() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only to processes that ask for it.
bool tiles_granted() {
#if defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

Isa detect() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::portable;
    const bool has_xsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
    if (!has_xsave || !fma || !f16c || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::portable;
    const unsigned long long state = extended_control();
    const bool avx2 = (b & (1u << 5)) && (state & 0x6) == 0x6;
    if (!avx2) return Isa::portable;
    const unsigned f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
    const bool vnni = c & (1u << 11);
    if ((b & f_dq_bw_vl) != f_dq_bw_vl || !vnni || (state & 0xe6) != 0xe6) return Isa::avx2;
    const unsigned tiles = (1u << 22) | (1u << 24) | (1u << 25);
    const bool amx = (d & tiles) == tiles && (state & 0x60000) == 0x60000;
    unsigned a1, b1, c1, d1;
    const bool bf16 = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && (a1 & (1u << 5));
    return amx && bf16 && tiles_granted() ? Isa::amx : Isa::avx512;
}
#else
Isa detect() { return Isa::portable; }
#endif

Isa lower(Isa a, Isa b) { return static_cast<int>(a) < static_cast<int>(b) ? a : b; }

// Levels that the compiler could not build are not there, whatever the CPU has.
Isa compiled() {
#if defined(FEWBITS_WITH_AMX)
    return Isa::amx;
#elif defined(FEWBITS_WITH_AVX512)
    return Isa::avx512;
#elif defined(FEWBITS_WITH_AVX2)
    return Isa::avx2;
#else
    return Isa::portable;
#endif
}

Isa initial() {
    Isa wanted;
    const char *name = std::getenv("FEWBITS_ISA");
    return name && parse_isa(name, &wanted) ? lower(wanted, detected_isa()) : detected_isa();
}

Isa &current() {
    static Isa level = initial();
    return level;
}

const char *const names[] = {"portable", "avx2", "avx512", "amx"};

}  // namespace

Isa detected_isa() {
    static const Isa level = lower(detect(), compiled());
    return level;
}

Isa isa() { return current(); }

void limit_isa(Isa most) { current() = lower(most, detected_isa()); }

const char *isa_name(Isa level) { return names[static_cast<int>(level)]; }

bool parse_isa(const char *name, Isa *level) {
    for (int i = 0; i < 4; ++i) {
        if (std::strcmp(name, names[i]) == 0) {
            *level = static_cast<Isa>(i);
            return true;
        }
    }
    return false;
}

}  // namespace fewbits
