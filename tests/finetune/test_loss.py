"""The loss by chunks is transformers' own; rows that share examples are as good as separate ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.finetune import Adapter, Rows, loss
from fewbits.finetune.adapter import attach
from fewbits.finetune.data import IGNORED, collate, read
from fewbits.finetune.loss import Loss
from fewbits.runtime import load
from tests.tiny import tiny_model


def tuned(path: Path) -> Any:
    model = attach(load(path)[0], Adapter(r=4, dropout=0), "base", 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def gradients(model: Any, value: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    value.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_chunks_give_the_models_own_loss_and_gradients(
    dense: Path, tokenizer: Any, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    model = tuned(dense)
    batch = collate(read(examples, tokenizer, Rows(40))[:3], 0)
    ours = Loss(model).check(batch)
    assert ours.chunked
    own = Loss(model)
    for count in (None, torch.tensor(17)):
        a, b = ours(batch, count), own(batch, count)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for x, y in zip(gradients(model, a * 3), gradients(model, b * 3), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_packed_row_is_its_examples(dense: Path, tokenizer: Any, examples: Path) -> None:
    model = tuned(dense)
    alone, packed = (read(examples, tokenizer, Rows(60, packing=p)) for p in (False, True))
    value = Loss(model).check(collate(packed[:1], 0))
    assert value.chunked and (packed[0].positions == 0).sum() > 2
    batch = collate(packed, 0)
    count = (batch["labels"] != IGNORED).sum()
    singly = sum(value(collate([r], 0), 1) for r in alone) / count
    torch.testing.assert_close(value(batch, count), singly, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt2", "phi3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    model = load(tiny_model(family, tmp_path / "m"))[0].requires_grad_(False)
    ids = torch.randint(3, 100, (2, 12))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(12).expand(2, -1)}
    value = Loss(model).check(batch)
    assert value.chunked
    torch.testing.assert_close(value(batch), Loss(model)(batch), rtol=1e-4, atol=1e-5)


def test_a_head_of_another_kind_keeps_its_own_loss(dense: Path) -> None:
    model = load(dense)[0].requires_grad_(False)
    linear = model.get_output_embeddings()
    linear.register_forward_hook(lambda m, args, out: out * 2 if args[0].ndim == 3 else out)
    ids = torch.randint(3, 100, (2, 12))
    assert not Loss(model).check({"input_ids": ids, "labels": ids}).chunked
    linear._forward_hooks.clear()
    assert Loss(model).check({"input_ids": ids, "labels": ids}).chunked
    linear.requires_grad_(True)
    assert not Loss(model).check({"input_ids": ids, "labels": ids}).chunked
