#include "solver_kernels.hpp"

namespace fewbits {

const SolverKernels &solver_avx512() {
    static const SolverKernels kernels = {fit, sweep};
    return kernels;
}

}  // namespace fewbits
