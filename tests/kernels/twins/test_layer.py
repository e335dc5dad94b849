"""QuantLinear on a device that has twins: the same weight, the twins' product, and the way there and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fewbits.grids import NAMED_GRIDS, Bilevel, Float, Int, Learned, Table
from fewbits.kernels import gpu
from fewbits.runtime import QuantLinear
from fewbits.solve import Nearest
from fewbits.tensor import Quantized, Sparse

GRIDS = [Int(4, 32), Int(3, -1, symmetric=True), Int(8, -1, rows=-1), Int(4, 20, rows=5)]


def quantized(grid: Int, scattered: bool = False) -> Quantized:
    torch.manual_seed(0)
    w = torch.randn(50, 160)
    p = grid.fit(w)
    if scattered:
        p["g_idx"] = grid.index(p, 160)[torch.randperm(160)].int()
    return Quantized(grid, grid.encode(w, p), p)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_layer_runs_the_twin(grid: Int) -> None:
    q, bias, x = quantized(grid, grid == GRIDS[0]), torch.randn(50), torch.randn(2, 3, 160)
    layer = QuantLinear.from_quantized(q, bias)
    assert layer._twin is not None and layer._loose is None
    assert layer.nbytes < 1.3 * 50 * 160 * grid.bits / 8 + 4000
    assert torch.equal(layer.dequantize(), q.dense())
    torch.testing.assert_close(layer(x), F.linear(x, q.dense(), bias), rtol=2e-5, atol=2e-5)


# 160 columns: blocks of 64 straddle rows, as bitsandbytes' do, blocks of 32 do not.
TABLES = {
    "nf4": (Table("nf4", 32), gpu.TableWeight),
    "nf4, straddling": (Table("nf4", 64), gpu.TableWeight),
    "nf4, doubly quantized": (Table("nf4", 32, nested=True), gpu.TableWeight),
    "fp4 of bitsandbytes, rows": (Table("fp4", -1), gpu.TableWeight),
    "mxfp4": (NAMED_GRIDS["mxfp4"], gpu.TableWeight),
    "nvfp4": (NAMED_GRIDS["nvfp4"], gpu.TableWeight),
    "fp8, rows": (NAMED_GRIDS["fp8"], gpu.ByteWeight),
    "fp8, tensor": (NAMED_GRIDS["fp8-tensor"], gpu.ByteWeight),
    "fp8, blocks": (Float("e4m3", 64, 32), gpu.ByteWeight),
    "mxfp8": (NAMED_GRIDS["mxfp8"], gpu.ByteWeight),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_and_floats_run_their_twins_and_come_back(name: str) -> None:
    grid, kind = TABLES[name]
    torch.manual_seed(1)
    q, bias, x = Nearest()(torch.randn(50, 160), grid, None), torch.randn(50), torch.randn(2, 3, 160)
    layer = QuantLinear.from_quantized(q, bias)
    assert type(layer._twin) is kind and layer._loose is None
    torch.testing.assert_close(layer.dequantize(), q.dense(), rtol=3e-7, atol=0)
    torch.testing.assert_close(layer(x), F.linear(x, q.dense(), bias), rtol=2e-5, atol=2e-5)
    layer._move(torch.empty(0).device)
    assert type(layer._twin) is kind
    torch.testing.assert_close(layer.dequantize(), q.dense(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("grid", [Learned(3), Bilevel(3, 16), Int(4, 32)], ids=str)
def test_single_weights_stay_beside_what_the_twin_holds(grid: Learned | Bilevel | Int, single: bool) -> None:
    torch.manual_seed(2)
    q, x = Nearest()(torch.randn(50, 160), grid, None), torch.randn(2, 3, 160)
    if single:
        q = replace(q, residual=Sparse.of(torch.randn(50, 160) * (torch.rand(50, 160) < 0.02)))
    layer = QuantLinear.from_quantized(q)
    for _ in range(2):
        assert layer._twin is not None and layer._loose is None
        torch.testing.assert_close(layer.dequantize(), q.dense(), rtol=3e-7, atol=0)
        torch.testing.assert_close(layer(x), F.linear(x, q.dense()), rtol=2e-5, atol=5e-5)
        assert layer.nbytes < 1.1 * q.grid.cost(q.shape) * 1000 + 3000
        layer._move(torch.empty(0).device)


@pytest.mark.parametrize("grid", [NAMED_GRIDS["fp8-e5m2"], NAMED_GRIDS["mxfp6"]], ids=str)
def test_floats_without_a_twin_are_dequantized(grid: Float) -> None:
    q, x = Nearest()(torch.randn(50, 160), grid, None), torch.randn(3, 160)
    layer = QuantLinear.from_quantized(q)
    assert layer._twin is None and layer._loose is not None
    torch.testing.assert_close(layer(x), x @ q.dense().T, rtol=2e-5, atol=2e-5)


def test_moving_comes_back_to_the_same_weight() -> None:
    q = quantized(Int(3, 32), scattered=True)
    layer = QuantLinear.from_quantized(q)
    layer._move(torch.empty(0).device)
    assert layer._twin is not None and torch.equal(layer.dequantize(), q.dense())


def test_what_a_twin_does_not_hold_is_dequantized() -> None:
    q, x = quantized(Int(4, 32), scattered=True), torch.randn(3, 160)
    q.params["g_idx"][:] = 0
    layer = QuantLinear.from_quantized(q)
    assert layer._twin is None
    torch.testing.assert_close(layer(x), x @ q.dense().T, rtol=2e-5, atol=2e-5)


def test_inputs_get_gradients() -> None:
    q, x = quantized(Int(4, 32)), torch.randn(3, 160, requires_grad=True)
    QuantLinear.from_quantized(q)(x).sum().backward()
    torch.testing.assert_close(x.grad, q.dense().sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)
