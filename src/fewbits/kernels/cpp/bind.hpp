// Each family of ops adds its functions to the module.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace fewbits {

// Tensors come from Python as addresses.
template <class T>
T *at(std::uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

void bind_solver(nanobind::module_ &m);
void bind_w8a8(nanobind::module_ &m);
void bind_kquant(nanobind::module_ &m);
void bind_fixed(nanobind::module_ &m);
void bind_few(nanobind::module_ &m);
void bind_cluster(nanobind::module_ &m);
void bind_sparse(nanobind::module_ &m);
void bind_fake(nanobind::module_ &m);
#if defined(FEWBITS_WITH_QLINEAR)
void bind_qlinear(nanobind::module_ &m);  // defined in qlinear.cpp
#endif

}  // namespace fewbits
