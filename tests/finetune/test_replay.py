"""Checkpointing that keeps products: the same numbers as without, and each product made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fewbits.finetune import Adapter, Rows, Training, finetune, replay
from fewbits.runtime import QuantLinear


def test_gradients_of_nested_products() -> None:
    a, b = (torch.randn(8, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    made = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            return replay.once(lambda: made.append(1) or x @ w)  # type: ignore[func-returns-value]

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, w = ctx.saved_tensors
            return dy @ w.t(), x.t() @ dy

    def block(x: torch.Tensor) -> torch.Tensor:
        return Product.apply(torch.tanh(Product.apply(x, a)), b).sin()

    def grads(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8).requires_grad_()
        return list(torch.autograd.grad(run(run(x)).square().sum(), [x, a, b]))

    plain = grads(block)
    made.clear()
    kept = grads(lambda x: checkpoint(block, x, use_reentrant=False, context_fn=replay.contexts))
    assert len(made) == 4  # two products in each of two blocks, and none again
    assert all(torch.equal(p, k) for p, k in zip(plain, kept, strict=True))


def test_a_product_that_the_model_wrote_into_is_made_again() -> None:
    def grad(kept: bool) -> torch.Tensor:
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_()

        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return replay.once(lambda: 2 * x)

            @staticmethod
            def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
                return 2 * dy

        def block(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = Double.apply(x)
            return y.add_(1).square()

        given = {"context_fn": replay.contexts} if kept else {}
        return torch.autograd.grad(checkpoint(block, x, use_reentrant=False, **given).sum(), x)[0]

    assert torch.equal(grad(True), grad(False))


def test_runs_are_the_same_with_a_product_less(
    dense: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    product = QuantLinear.product
    monkeypatch.setattr(QuantLinear, "product", lambda self, x: made.append(1) or product(self, x))
    losses, counts = [], []
    for keep in (True, False):
        made.clear()
        training = Training(steps=3, batch=2, lr=5e-3, keep_products=keep)
        finetune(dense, tmp_path / str(keep), examples, training=training, rows=Rows(48), adapter=Adapter(r=4))
        losses.append((tmp_path / str(keep) / "adapter_model.safetensors").read_bytes())
        counts.append(len(made))
    assert losses[0] == losses[1]
    assert counts[0] < 0.6 * counts[1]
