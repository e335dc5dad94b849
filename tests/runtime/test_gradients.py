"""Gradients through quantized layers: exact for every grid, and nothing of the dense weight's size left over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fewbits.activations import PRESETS, Inputs
from fewbits.grids import BLOCK_TYPES, NAMED_GRIDS, Block, Int, Table
from fewbits.runtime import QuantLinear
from fewbits.tensor import Quantized

GRIDS: dict[str, Any] = NAMED_GRIDS | {f"block-{t}": Block(t) for t in BLOCK_TYPES}
GRIDS |= {"int4-rows": Int(4, 64, rows=4), "int8-tensor": Int(8, -1, rows=-1), "straddling": Table("nf4", 48)}
GRIDS |= {"straddling-dq": Table("nf4", 48, nested=True)}


def quantized(grid: Any, out: int = 1040, columns: int = 256, scattered: bool = False, **rest: Any) -> Quantized:
    """Wider than two tiles, with a short last one."""
    torch.manual_seed(0)
    w = torch.randn(out, columns)
    p = grid.fit(w)
    if scattered:
        p["g_idx"] = grid.index(p, columns)[torch.randperm(columns)].int()
    return Quantized(grid, grid.encode(w, p), p, **rest)


def both(layer: QuantLinear, w: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ours, autograd's): output and gradient of the input."""
    dy = torch.randn(*x.shape[:-1], layer.out_features, dtype=x.dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(ours)
    expected = F.linear(theirs, w, None if layer.bias is None else layer.bias.to(x.dtype))
    y.backward(dy)
    expected.backward(dy)
    yield y, expected
    yield ours.grad, theirs.grad  # type: ignore[misc]


@pytest.mark.parametrize("name", GRIDS)
def test_float64_gradients_are_those_of_the_dense_weight(name: str) -> None:
    q = quantized(GRIDS[name])
    layer = QuantLinear.from_quantized(q, torch.randn(1040, dtype=torch.float64))
    w = layer.dequantize()
    torch.testing.assert_close(w, q.dense(), rtol=3e-7, atol=0)  # NVFP4's two scales may be multiplied in another order
    for got, expected in both(layer, w.double(), torch.randn(2, 3, 256, dtype=torch.float64)):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["int3", "int4", "nf4-dq", "nvfp4", "fp8", "llm-int8", "block-q4_k", "straddling"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_training_dtypes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    q = quantized(GRIDS[name])
    layer = QuantLinear.from_quantized(q)
    for got, expected in both(layer, q.dense(), torch.randn(40, 256).to(dtype).float()):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance * scale)
    x = torch.randn(40, 256).to(dtype).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    expected = q.dense().sum(0).expand(40, -1)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["int4", "int4-rows", "nf4-dq", "nvfp4", "fp8-block", "straddling"])
def test_without_the_extension(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.kernels import qlinear

    monkeypatch.setattr(qlinear, "_C", None)
    q = quantized(GRIDS[name])
    layer = QuantLinear.from_quantized(q)
    assert layer._packed is None
    for got, expected in both(layer, q.dense().double(), torch.randn(3, 256, dtype=torch.float64)):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_scattered_groups_and_uneven_ones() -> None:
    q = quantized(Int(4, 32), scattered=True)
    uneven = Quantized(q.grid, q.codes, q.params | {"g_idx": torch.zeros_like(q.params["g_idx"])})
    for weight in (q, uneven):
        layer = QuantLinear.from_quantized(weight)
        for got, expected in both(layer, weight.dense().double(), torch.randn(3, 256, dtype=torch.float64)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_rounded_inputs_hand_their_gradient_through() -> None:
    q = quantized(Int(8, -1, symmetric=True, scale="float32"), inputs=Inputs(PRESETS["int8"]))
    layer = QuantLinear.from_quantized(q)
    assert layer._integer is not None
    x, dy = torch.randn(5, 256, dtype=torch.float64, requires_grad=True), torch.randn(5, 1040, dtype=torch.float64)
    layer(x).backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dy @ q.dense().double(), rtol=1e-6, atol=1e-6)


class Large(TorchDispatchMode):
    """Remembers the storage of every tensor of at least ``size`` bytes that an operation returned."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.seen = size, list[StorageWeakRef]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= self.size:
                self.seen.append(StorageWeakRef(t.untyped_storage()))
        return out

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(not ref.expired() for ref in self.seen)


@pytest.mark.parametrize("name", ["int4", "nf4-dq", "nvfp4", "llm-int8", "block-q4_k", "straddling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_dense_weight_is_alive_after_forward(name: str, dtype: torch.dtype) -> None:
    out, columns = 2048, 256
    layer = QuantLinear.from_quantized(quantized(GRIDS[name], out, columns))
    x = torch.randn(20, columns, dtype=dtype, requires_grad=True)
    with Large(out * columns * dtype.itemsize) as large:
        y = layer(x)
        assert large.alive == 0
        y.sum().backward()
        assert large.alive == 0
    if name != "straddling":  # whose blocks cross rows: decoded whole, and dropped
        assert not large.seen


def test_the_memory_test_sees_what_autograd_keeps() -> None:
    q = quantized(NAMED_GRIDS["int4"], 2048)
    x = torch.randn(20, 256, requires_grad=True)
    with Large(2048 * 256 * 4) as large:
        y = F.linear(x, q.dense())
        assert large.alive > 0
    del y
