// Aligned memory that its owner keeps from call to call: the system's zeroing of fresh pages would cost as much as a
// product. Declare it `static thread_local`.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fewbits {

class Scratch {
  public:
    // At least `bytes`, a multiple of 64, aligned to 64; what was there before is lost when it has to grow.
    char *get(std::int64_t bytes) {
        if (size_ < bytes) {
            size_ = 0;
            memory_.reset(static_cast<char *>(std::aligned_alloc(64, bytes)));
            if (!memory_) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(void *p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
    std::int64_t size_ = 0;
};

}  // namespace fewbits
