"""The int8 product is exact on every instruction set that this machine has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import RequestError
from fewbits.kernels import w8a8

from .test_qlinear import level

assert level  # a fixture

if not w8a8.available():
    pytest.skip("the C++ extension is not built", allow_module_level=True)


def random(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(1, 16, 64), (7, 50, 577), (13, 33, 3), (12, 144, 1200), (64, 1, 1), (0, 16, 8)])
def test_exact(level: str, shape: tuple[int, int, int]) -> None:
    rows, out, columns = shape
    x, w = random(rows, columns), random(out, columns)
    want = (x.long() @ w.long().T).int()
    assert torch.equal(w8a8.matmul(x, w), want)
    assert torch.equal(w8a8.reference_matmul(x, w), want)


def test_extremes(level: str) -> None:
    """-128 times -128 in every place: the largest pair, the largest sum."""
    low = torch.full((5, 4096), -128, dtype=torch.int8)
    assert (w8a8.matmul(low, low) == 4096 * 2**14).all()
    high = torch.full((5, 4096), 127, dtype=torch.int8)
    assert (w8a8.matmul(high, low) == -4096 * 127 * 128).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 600), st.integers(0, 2**31))
def test_any_shape(rows: int, out: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, w = random(rows, columns), random(out, columns)
    assert torch.equal(w8a8.matmul(x, w), (x.long() @ w.long().T).int())


def test_threads_and_leading_dimensions(level: str) -> None:
    x, w, before, results = random(2, 30, 700), random(520, 700), torch.get_num_threads(), []
    packed = w8a8.pack(w)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(w8a8.matmul(x, packed))
    torch.set_num_threads(before)
    assert all(torch.equal(r, (x.long() @ w.long().T).int()) for r in results)


def test_wrong_arguments() -> None:
    with pytest.raises(RequestError, match="needs w int8"):
        w8a8.pack(torch.zeros(3, 4))
    with pytest.raises(RequestError, match=r"x int8\[..., 4\]"):
        w8a8.matmul(random(2, 5), random(3, 4))
