"""Our adapted layer is peft's function: values and gradients, with dropout, bias and scattered targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear

from fewbits.errors import RequestError
from fewbits.finetune.adapter import QuantLora, targets
from fewbits.grids import Int, Table
from fewbits.runtime import QuantLinear
from fewbits.tensor import Quantized


def layer(grid: Any, dropout: float, dtype: torch.dtype, bias: bool) -> QuantLora:
    torch.manual_seed(0)
    w = torch.randn(600, 128)
    p = grid.fit(w)
    base = QuantLinear.from_quantized(Quantized(grid, grid.encode(w, p), p), torch.randn(600) if bias else None)
    made = QuantLora(base, "default", LoraConfig(r=4, lora_dropout=dropout), r=4, lora_alpha=6)
    for p in (made.lora_A["default"].weight, made.lora_B["default"].weight):
        p.data = torch.randn(p.shape, dtype=dtype)
    return made


@pytest.mark.parametrize("grid", [Int(4, 32), Table("nf4", 64, nested=True)])
@pytest.mark.parametrize(("dropout", "bias"), [(0.0, True), (0.3, False)])
@pytest.mark.parametrize("first", [True, False])
def test_it_is_pefts_function(grid: Any, dropout: float, bias: bool, first: bool) -> None:
    made = layer(grid, dropout, torch.float64, bias)
    found = []
    for forward in (QuantLora.forward, LoraLinear.forward):
        x = torch.linspace(-1, 1, 2 * 5 * 128, dtype=torch.float64).view(2, 5, 128).requires_grad_(not first)
        made.zero_grad()
        torch.manual_seed(1)  # the same dropout
        y = forward(made, x)
        (y * torch.linspace(0, 1, 600, dtype=torch.float64)).sum().backward()
        grads = [made.lora_A["default"].weight.grad, made.lora_B["default"].weight.grad, x.grad]
        found.append([y, *(g.clone() for g in grads if g is not None)])
    assert len(found[0]) == 4 - first
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_codes_do_not_take_adapters_up() -> None:
    with pytest.raises(RequestError, match="fewbits merge"):
        layer(Int(4, 32), 0.0, torch.float32, False).merge()


def test_targets_are_last_names_unless_something_else_has_them() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.ModuleDict({"q": QuantLinear(2, 2), "gate": torch.nn.Linear(2, 2)})
            self.head = torch.nn.Linear(2, 2)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    model = Model()
    assert targets(model, ("all-linear",)) == ["gate", "q"]
    model.b = torch.nn.ModuleDict({"gate": torch.nn.ReLU()})
    assert targets(model, ("all-linear",)) == ["a.gate", "a.q"]
    assert targets(model, ("q",)) == ["q"]
    with pytest.raises(RequestError, match="allowed: all-linear, gate, q"):
        targets(model, ("k",))
