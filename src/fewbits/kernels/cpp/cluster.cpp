// Weighted k-means of sorted numbers, exactly, by dynamic programming.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "bind.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace fewbits {
namespace {

// Clusters of sorted numbers are intervals. With prefix sums A0 = Σ f, A1 = Σ f v an interval (i, j] costs Σ f v² less
// A1²/A0; the first part is the same for every partition, so the second is maximised. D[j] is the best gain of the first j
// numbers in m clusters; where the last one begins rises with j, which halves the search again and again.
class Clusters {
  public:
    Clusters(std::int64_t n, int k) : n_(n), k_(k), a0_(n + 1), a1_(n + 1), last_(n + 1), next_(n + 1), from_(n * k + n) {}

    void row(const float *v, const float *f, float *centers) {
        double mass = 0, moment = 0;
        for (std::int64_t i = 0; i < n_; ++i) mass += f[i], moment += static_cast<double>(f[i]) * v[i];
        const double mean = mass > 0 ? moment / mass : 0;
        a0_[0] = a1_[0] = 0;
        for (std::int64_t i = 0; i < n_; ++i) {
            a0_[i + 1] = a0_[i] + f[i];
            a1_[i + 1] = a1_[i] + f[i] * (v[i] - mean);
        }
        const int clusters = static_cast<int>(std::min<std::int64_t>(k_, n_));
        for (std::int64_t j = 0; j <= n_; ++j) last_[j] = gain(0, j);
        for (int m = 1; m < clusters; ++m) {
            layer(m);
            last_.swap(next_);
        }
        std::int64_t end = n_;
        for (int m = clusters - 1; m >= 0; --m) {
            const std::int64_t begin = m ? from_[m * (n_ + 1) + end] : 0;
            centers[m] = static_cast<float>(mean + center(v, mean, begin, end));
            end = begin;
        }
        for (int m = clusters; m < k_; ++m) centers[m] = clusters ? centers[clusters - 1] : 0.0f;
    }

  private:
    double gain(std::int64_t i, std::int64_t j) const {
        const double mass = a0_[j] - a0_[i], moment = a1_[j] - a1_[i];
        return mass > 0 ? moment * moment / mass : 0;
    }

    double center(const float *v, double mean, std::int64_t i, std::int64_t j) const {
        const double mass = a0_[j] - a0_[i];
        if (mass > 0) return (a1_[j] - a1_[i]) / mass;
        double sum = 0;
        for (std::int64_t t = i; t < j; ++t) sum += v[t] - mean;
        return j > i ? sum / static_cast<double>(j - i) : 0;
    }

    struct Span {
        std::int64_t lo, hi, first, last;
    };

    void layer(int m) {
        std::int32_t *from = from_.data() + m * (n_ + 1);
        spans_.clear();
        spans_.push_back({m + 1, n_, m, n_ - 1});
        while (!spans_.empty()) {
            const Span s = spans_.back();
            spans_.pop_back();
            if (s.lo > s.hi) continue;
            const std::int64_t mid = (s.lo + s.hi) / 2, end = std::min(mid - 1, s.last);
            double best = -1;
            std::int64_t where = s.first;
            for (std::int64_t i = s.first; i <= end; ++i) {
                const double found = last_[i] + gain(i, mid);
                if (found > best) best = found, where = i;
            }
            next_[mid] = best;
            from[mid] = static_cast<std::int32_t>(where);
            spans_.push_back({s.lo, mid - 1, s.first, where});
            spans_.push_back({mid + 1, s.hi, where, s.last});
        }
    }

    std::int64_t n_;
    int k_;
    std::vector<double> a0_, a1_, last_, next_;
    std::vector<std::int32_t> from_;
    std::vector<Span> spans_;
};

void kmeans(std::uintptr_t v, std::uintptr_t f, std::uintptr_t centers, std::int64_t rows, std::int64_t columns, int k,
            int threads) {
    parallel_for(rows, 16, threads, [&](std::int64_t begin, std::int64_t end) {
        Clusters clusters(columns, k);
        for (std::int64_t r = begin; r < end; ++r) {
            clusters.row(at<const float>(v) + r * columns, at<const float>(f) + r * columns, at<float>(centers) + r * k);
        }
    });
}

}  // namespace

void bind_cluster(nb::module_ &m) {
    m.def("kmeans", &kmeans, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace fewbits
