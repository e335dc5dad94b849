// Python bindings. Tensors cross as addresses and sizes: the Python side has checked shapes, dtypes and contiguity.
#include <nanobind/nanobind.h>

#include "bind.hpp"
#include "cpu.hpp"

namespace nb = nanobind;

NB_MODULE(_C, m) {
    m.def("detected_isa", [] { return fewbits::isa_name(fewbits::detected_isa()); });
    m.def("isa", [] { return fewbits::isa_name(fewbits::isa()); });
    m.def("limit_isa", [](const char *name) {
        fewbits::Isa level;
        if (!fewbits::parse_isa(name, &level)) throw nb::value_error("levels are portable, avx2, avx512, amx");
        fewbits::limit_isa(level);
    });
#if defined(_OPENMP)
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    fewbits::bind_solver(m);
    fewbits::bind_w8a8(m);
    fewbits::bind_kquant(m);
    fewbits::bind_fixed(m);
    fewbits::bind_few(m);
    fewbits::bind_cluster(m);
    fewbits::bind_sparse(m);
    fewbits::bind_fake(m);
#if defined(FEWBITS_WITH_QLINEAR)
    fewbits::bind_qlinear(m);
#endif
}
