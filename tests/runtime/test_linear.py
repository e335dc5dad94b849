"""QuantLinear: exactness, gradients, devices, copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fewbits.errors import RequestError
from fewbits.grids import Int
from fewbits.runtime import QuantLinear
from fewbits.tensor import Quantized

GRIDS = [Int(b, g, symmetric=s) for b in (2, 3, 4, 5, 8) for g, s in ((32, False), (-1, True))]
GRIDS += [
    Int(4, 128),
    Int(4, 32, scale="bfloat16"),
    Int(4, 64, scale="float32"),
    Int(8, -1, rows=-1),
    Int(4, 20, rows=5),
]


def quantized(grid: Int, out: int = 50, columns: int = 160, scattered: bool = False) -> Quantized:
    torch.manual_seed(0)
    w = torch.randn(out, columns)
    p = grid.fit(w)
    if scattered:
        p["g_idx"] = grid.index(p, columns)[torch.randperm(columns)].int()
    return Quantized(grid, grid.encode(w, p), p)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_dequantize_is_dense_exactly_and_forward_is_linear(grid: Int) -> None:
    q, bias, x = quantized(grid), torch.randn(50), torch.randn(2, 3, 160)
    layer = QuantLinear.from_quantized(q, bias)
    assert torch.equal(layer.dequantize(), q.dense())
    torch.testing.assert_close(layer(x), F.linear(x, q.dense(), bias), rtol=2e-5, atol=2e-5)


def test_scattered_groups_and_uneven_ones() -> None:
    q, x = quantized(Int(4, 32), scattered=True), torch.randn(3, 160)
    layer = QuantLinear.from_quantized(q)
    assert layer._packed is not None and torch.equal(layer.dequantize(), q.dense())
    torch.testing.assert_close(layer(x), x @ q.dense().T, rtol=2e-5, atol=2e-5)
    q.params["g_idx"][:] = 0  # every column from one group: the kernels do not hold that
    layer = QuantLinear.from_quantized(q)
    assert layer._packed is None and torch.equal(layer.dequantize(), q.dense())
    torch.testing.assert_close(layer(x), x @ q.dense().T, rtol=2e-5, atol=2e-5)


def test_inputs_get_gradients() -> None:
    q, x = quantized(Int(4, 32)), torch.randn(3, 160, requires_grad=True)
    QuantLinear.from_quantized(q)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, q.dense().sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


def test_bias_changes_are_seen() -> None:
    q, x = quantized(Int(4, 32)), torch.randn(1, 160)
    layer = QuantLinear.from_quantized(q, torch.zeros(50))
    before = layer(x)
    layer.bias.data.add_(1.0)
    torch.testing.assert_close(layer(x), before + 1)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), q.dense())  # changing the dtype does not round scales


def test_copies_are_independent_and_empty_layers_say_so() -> None:
    q, x = quantized(Int(4, 32)), torch.randn(1, 160)
    layer = QuantLinear.from_quantized(q)
    twin = copy.deepcopy(layer)
    del layer
    torch.testing.assert_close(twin(x), x @ q.dense().T, rtol=2e-5, atol=2e-5)
    assert "bits=4, group=32" in repr(twin)
    with pytest.raises(RequestError, match="no weight yet"):
        QuantLinear(4, 4)(torch.ones(1, 4))
    with pytest.raises(RequestError, match="the layer is"):
        QuantLinear(4, 4).fill(q)


def test_moving_unpacks_to_the_same_weight() -> None:
    q = quantized(Int(3, 32), scattered=True)
    layer = QuantLinear.from_quantized(q)
    layer._move(torch.device("cpu"))  # what .to(device) does, without a second device
    assert torch.equal(layer.dequantize(), q.dense())


def test_reference_serves_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.kernels import qlinear

    monkeypatch.setattr(qlinear, "_C", None)
    q, x = quantized(Int(4, 32)), torch.randn(9, 160)
    layer = QuantLinear.from_quantized(q)
    assert layer._packed is None
    torch.testing.assert_close(layer(x), x @ q.dense().T)
