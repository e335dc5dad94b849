"""Products of bytes with weights of few bits: C++ against the specification in plain torch, and by hand."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.kernels import few, reference


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(m, n, group, seed=1):
    g = torch.Generator().manual_seed(seed)
    groups = -(-n // group)
    codes = torch.randint(0, 16, (m, n), generator=g, dtype=torch.uint8)
    zero = torch.randint(0, 16, (m, groups), generator=g).float()
    return codes, torch.rand(m, groups, generator=g) + 0.1, zero, group


@pytest.mark.parametrize(
    ("tokens", "n", "m", "group"),
    [(1, 1, 1, 1), (48, 64, 48, 32), (50, 576, 49, 64), (97, 130, 200, 130), (300, 100, 47, 64), (5, 160, 7, 96)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_the_specification(isa, tokens, n, m, group, biased):
    parts, x, bias = weight(m, n, group), make(tokens, n), make(m, seed=2) if biased else None
    got = few.few_linear(x, few.Few.of(*parts), bias)
    codes, scale, zero, _ = parts
    s, z = (t.repeat_interleave(group, 1)[:, :n].double() for t in (scale, zero))
    exact = reference.fixed_point(x, few.RUN, few.MOST).double() @ ((codes - z) * s).T
    exact = exact if bias is None else exact + bias
    assert torch.allclose(got.double(), exact, rtol=0, atol=1e-5 * n**0.5)
    assert torch.allclose(reference.few_linear(x, *parts, bias).double(), exact, rtol=0, atol=1e-4 * n**0.5)


def test_the_largest_codes_overflow_nothing(isa):
    """Rows of +-127 steps against codes of 15 are exact in 16 bits a run."""
    x = torch.full((48, 96), 127.0)
    x[1::2] = -127.0
    codes, one = torch.full((48, 96), 15, dtype=torch.uint8), torch.ones(48, 1)
    got = few.few_linear(x, few.Few.of(codes, one, torch.zeros(48, 1), 96))
    assert torch.equal(got, (x[:, :1] * 15 * 96).expand(48, 48))
    got = few.few_linear(x, few.Few.of(codes, one, torch.full((48, 1), 15.0), 96))
    assert torch.equal(got, torch.zeros(48, 48))


def test_strided_rows_are_read_in_place(isa):
    wide, parts = make(60, 300), weight(20, 100, 32)
    w = few.Few.of(*parts)
    assert torch.equal(few.few_linear(wide[:, 100:200], w), few.few_linear(wide[:, 100:200].contiguous(), w))
    assert few.few_linear(wide[:, :100].view(5, 12, 100), w).shape == (5, 12, 20)


@pytest.mark.parametrize("m", [2064, 2051])
def test_large_results_are_those_of_their_parts(isa, m):
    """Large ones are written past the caches, where lines are whole."""
    x, w = make(2050, 32), few.Few.of(*weight(m, 32, 32))
    assert 2050 * m > 4 << 20
    assert torch.equal(few.few_linear(x, w), torch.cat([few.few_linear(part, w) for part in x.split(480)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(isa, bad):
    x = make(60, 200)
    x[7, 150] = bad
    out = few.few_linear(x, few.Few.of(*weight(10, 200, 64)))
    assert out[7].isnan().all() and out[:7].isfinite().all() and out[8:].isfinite().all()


def test_threads_change_nothing(isa):
    x, w, before, seen = make(1000, 576), few.Few.of(*weight(200, 576, 64)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(few.few_linear(x, w))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_wrong_shapes_are_refused():
    codes, scale, zero, _ = weight(8, 96, 32)
    with pytest.raises(RequestError, match="whole runs"):
        few.Few.of(codes, scale, zero, 48)
    with pytest.raises(RequestError, match="scale and zero must be"):
        few.Few.of(codes, scale[:, :2], zero, 32)
    with pytest.raises(RequestError, match="codes uint8"):
        few.Few.of(codes.int(), scale, zero, 32)
    w = few.Few.of(codes, scale, zero, 32)
    with pytest.raises(RequestError, match="few_linear needs x"):
        few.few_linear(make(4, 95), w)
    with pytest.raises(RequestError, match="bias must be"):
        few.few_linear(make(4, 96), w, make(7))
