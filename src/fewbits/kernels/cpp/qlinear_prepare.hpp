// Activations in the form that a product reads.
#pragma once

#include "qlinear.hpp"

namespace fewbits::qlinear {

// Shift of column j inside its lane (3 bits: of its two low bits).
inline int step_of(int bits, int j) {
    if (bits == 8) return 8 * j;
    const int width = bits == 3 ? 2 : bits, local = bits == 3 ? j % 16 : j;
    return width * (local / 2) + 16 * (j % 2);
}

// Fills p's activations (memory of this thread, until its next call) and batch, and returns the product that reads them.
ProductFn prepare(const Kernels& k, const Weight& w, const Rows& x, Product& p);

}  // namespace fewbits::qlinear
