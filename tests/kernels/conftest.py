import pytest

from fewbits.kernels import _table


@pytest.fixture(params=["portable", "avx2"])
def isa(request):
    if _table.C is None:
        pytest.skip("no C++ extension")
    _table.C.limit_isa(request.param)
    if _table.C.isa() != request.param:
        _table.C.limit_isa("amx")
        pytest.skip(f"no {request.param}")
    yield request.param
    _table.C.limit_isa("amx")
