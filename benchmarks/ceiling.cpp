// What two cores could multiply at best with AVX2: products of 16-bit integers, of float32, and of bytes, with nothing to load.
//
//     g++ -O2 -mavx2 -mfma -pthread benchmarks/ceiling.cpp -o ceiling && ./ceiling
//
// Twelve independent sums in registers, one thread per core; billions of multiplications and additions a second. A product that
// reads its operands stays below: `fixed_linear` and MKL are to be judged against these lines.
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

#define EACH(say) say(0) say(1) say(2) say(3) say(4) say(5) say(6) say(7) say(8) say(9) say(10) say(11)
#define WORDS(i) "vpmaddwd %%ymm12, %%ymm13, %%ymm14\n\tvpaddd %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"
#define FLOATS(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #i "\n\t"
#define BYTES(i) "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n\tvpaddw %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"
#define LOOP(name, step)                                                                                                 \
    void name(long rounds) {                                                                                             \
        __asm__ volatile("vzeroall\n\t1:\n\t" EACH(step) EACH(step) "dec %0\n\tjnz 1b\n\t"                               \
                         : "+r"(rounds)                                                                                  \
                         :                                                                                               \
                         : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",         \
                           "xmm10", "xmm11", "xmm12", "xmm13", "xmm14");                                                 \
    }

LOOP(words, WORDS)
LOOP(floats, FLOATS)
LOOP(bytes, BYTES)

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void report(const char *name, void (*loop)(long), int operations) {
    const long rounds = 30'000'000;
    const unsigned cores = std::thread::hardware_concurrency();
    std::vector<std::thread> threads;
    const double began = seconds();
    for (unsigned i = 0; i < cores; ++i) threads.emplace_back(loop, rounds);
    for (auto &t : threads) t.join();
    std::printf("%-44s %5.0f G/s on %u cores\n", name, cores * rounds * 24.0 * operations / (seconds() - began) / 1e9, cores);
}

}  // namespace

int main() {
    for (int round = 0; round < 3; ++round) {
        report("float32 (VFMADD231PS)", floats, 16);
        report("16-bit integers (VPMADDWD, VPADDD)", words, 32);
        report("bytes, sums of 16 bits (VPMADDUBSW, VPADDW)", bytes, 64);
    }
}
