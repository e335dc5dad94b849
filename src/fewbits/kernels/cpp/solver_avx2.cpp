#include "solver_kernels.hpp"

namespace fewbits {

const SolverKernels &solver_avx2() {
    static const SolverKernels kernels = {fit, sweep};
    return kernels;
}

}  // namespace fewbits
