"""Products with a table for each row, or nested scales, against the dense weight on every instruction set here."""

from __future__ import annotations

import itertools

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.grids import Bilevel
from fewbits.kernels import qbackward, qlinear, qrows

from .test_qlinear import EPS, level

assert level  # a fixture

SHAPES = [(48, 320), (50, 576), (33, 100), (16, 128), (5, 20), (1, 7), (17, 161)]


def weight(out: int, columns: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, the last one among them, and tables."""
    g = torch.Generator().manual_seed(out * 1000 + columns)
    codes = torch.randint(0, levels, (out, columns), generator=g).to(torch.uint8)
    codes[-1, -1] = levels - 1
    return codes, torch.randn(out, levels, generator=g).sort(1).values.half()


@pytest.mark.parametrize("levels", [2, 4, 8, 9, 16])
def test_product_is_the_dense_product(level: str, levels: int) -> None:
    for (out, columns), dtype in itertools.product(SHAPES, EPS):
        args = weight(out, columns, levels)
        p, w, bias = qrows.pack_rows(*args), qrows.reference_dense(*args), torch.randn(out)
        for rows in (1, 2, 3, 8, 11, 17):
            x = torch.randn(rows, columns).to(dtype)
            exact = x.double() @ w.double().T + bias.double()
            bound = (x.double().abs() @ w.double().abs().T + bias.double().abs()).max()
            error = (qlinear.matmul(x, p, bias).double() - exact).abs().max() / bound
            assert error < EPS[dtype], (out, columns, dtype, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_outlier_does_not_drown_the_others(level: str, dtype: torch.dtype) -> None:
    """It meets zeros, so the others alone make the output: too coarse for fixed point of 15 bits."""
    codes, table = weight(32, 256, 16)
    table[:, 8], codes[:, 5] = 0, 8
    x = torch.randn(1, 256).to(dtype)
    x[0, 5] = 1e4
    p, w = qrows.pack_rows(codes, table), qrows.reference_dense(codes, table)
    rest = x.double().abs()
    rest[0, 5] = 0
    error = (qlinear.matmul(x, p).double() - x.double() @ w.double().T).abs().max()
    assert error / (rest @ w.double().abs().T).max() < EPS[dtype]


@pytest.mark.parametrize("levels", [8, 16])
def test_codes_and_values_come_back(level: str, levels: int) -> None:
    for out, columns in SHAPES:
        args = weight(out, columns, levels)
        p, w = qrows.pack_rows(*args), qrows.reference_dense(*args)
        assert torch.equal(qlinear.unpack_codes(p), args[0])
        assert torch.equal(qlinear.dequantize(p), w)
        assert torch.equal(qlinear.dequantize(p, torch.bfloat16), w.bfloat16())
        assert torch.equal(qbackward.rows(p, 0, min(out, 16)), w[:16])


def test_stacked_weights_are_one(level: str) -> None:
    many = [weight(out, 576, 8) for out in (32, 16, 20)]
    stacked = qlinear.stack([qrows.pack_rows(*args) for args in many])
    assert stacked is not None
    x = torch.randn(1, 576)
    apart = torch.cat([qlinear.matmul(x, p) for p in stacked[1]], 1)
    assert torch.equal(qlinear.matmul(x, stacked[0]), apart)
    assert torch.equal(qlinear.dequantize(stacked[0]), torch.cat([qrows.reference_dense(*args) for args in many]))


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 16), (3, 32), (4, 16), (5, 16), (3, -1), (3, 10)])
def test_nested_scales(level: str, bits: int, group: int) -> None:
    for (out, columns), dtype in itertools.product([(48, 256), (50, 576), (33, 100)], EPS):
        grid = Bilevel(bits, group)
        w = torch.randn(out, columns, generator=torch.Generator().manual_seed(out))
        p = grid.fit(w)
        codes, dense = grid.encode(w, p), grid.decode(grid.encode(w, p), p)
        ranges = torch.stack([p[n] for n in ("scale_base", "scale_step", "zero_base", "zero_step")], -1)
        packed = qlinear.pack_nested(codes, p["scale_code"], p["zero_code"], ranges, bits, group)
        assert torch.equal(qlinear.dequantize(packed), dense)
        assert torch.equal(qlinear.unpack_codes(packed), codes)
        for rows in (1, 4, 9, 17):
            x = torch.randn(rows, columns).to(dtype)
            exact = x.double() @ dense.double().T
            bound = (x.double().abs() @ dense.double().abs().T).max()
            # Codes and zero points are multiplied apart: what they have in common cancels.
            assert (qlinear.matmul(x, packed).double() - exact).abs().max() / bound < 4 * EPS[dtype]


def test_wrong_requests_are_named() -> None:
    codes, table = weight(16, 64, 8)
    with pytest.raises(RequestError, match="code 7 is beyond the tables of 4 values"):
        qrows.pack_rows(codes, table[:, :4])
    with pytest.raises(RequestError, match=r"16 rows need tables float16 \[16, 1 to 16\]; got float16\[16, 32\]"):
        qrows.pack_rows(codes, table.repeat(1, 4))
    nested = codes[:, :4]
    with pytest.raises(RequestError, match="bits 9 cannot be packed"):
        qlinear.pack_nested(codes, nested, nested, torch.zeros(1, 4, 4).half(), 9, 16)
    for ranges in (torch.zeros(1, 3, 4).half(), torch.zeros(1, 4, 4)):  # read as they lie in memory
        with pytest.raises(RequestError, match="nested scales need uint8 codes and float16 ranges"):
            qlinear.pack_nested(codes, nested, nested, ranges, 3, 16)
    with pytest.raises(RequestError, match=r"scales of torch\.uint8 cannot be packed"):
        qlinear.pack_weight(codes, nested, nested, 3, 16)
