// Loops over independent items: which thread computes an item never changes what is computed.
#pragma once

#include <cstdint>

#if !defined(_OPENMP)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace fewbits {

// How many parts of `size` cover `all`.
inline std::int64_t parts(std::int64_t all, std::int64_t size) { return (all + size - 1) / size; }

// Calls body(begin, end) over [0, count) in chunks of `grain`. `threads` is torch.get_num_threads(), passed by the
// caller since our OpenMP settings need not be torch's. Not to be nested.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Body &body) {
    const std::int64_t chunks = parts(count, grain);
    const auto run = [&](std::int64_t chunk) {
        const std::int64_t begin = chunk * grain, end = begin + grain < count ? begin + grain : count;
        body(begin, end);
    };
    if (threads > chunks) threads = static_cast<int>(chunks);
    if (threads <= 1) {
        for (std::int64_t i = 0; i < chunks; ++i) run(i);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (std::int64_t i = 0; i < chunks; ++i) run(i);
#else
    std::atomic<std::int64_t> next{0};
    const auto work = [&] {
        for (std::int64_t i; (i = next.fetch_add(1)) < chunks;) run(i);
    };
    std::vector<std::thread> helpers;
    for (int t = 1; t < threads; ++t) helpers.emplace_back(work);
    work();
    for (auto &h : helpers) h.join();
#endif
}

}  // namespace fewbits
