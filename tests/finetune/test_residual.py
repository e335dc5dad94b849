"""Adapters that begin as what rounding lost: against the singular value decomposition, and in a run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fewbits
from fewbits.errors import RequestError
from fewbits.finetune import Adapter, Rows, Training, finetune, load_adapter, residual
from fewbits.finetune.data import read
from fewbits.finetune.model import observe
from fewbits.finetune.residual import low_rank
from fewbits.pipeline.mixing import Mixing
from fewbits.runtime import QuantLinear


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (8, 8)])
@pytest.mark.parametrize("r", [1, 5, 8])
def test_no_matrix_of_that_rank_is_nearer(shape: tuple[int, int], r: int) -> None:
    torch.manual_seed(0)
    R = torch.randn(shape, dtype=torch.float64)
    A, B = low_rank(R, r)
    U, S, V = torch.linalg.svd(R, full_matrices=False)
    torch.testing.assert_close(B @ A, U[:, :r] * S[:r] @ V[:r], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_no_matrix_of_that_rank_gives_a_nearer_output(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    R, x = torch.randn(shape).double(), torch.randn(500, shape[1]).double() @ torch.randn(shape[1], shape[1]).double()
    A, B = low_rank(R, 5, torch.linalg.cholesky(x.T @ x))
    least = torch.linalg.svdvals(x @ R.T)[5:].square().sum()
    torch.testing.assert_close((x @ (R - B @ A).T).square().sum(), least, rtol=1e-9, atol=0)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    plain = low_rank(R, 5)
    assert (x @ (R - plain[1] @ plain[0]).T).square().sum() > 1.2 * least


def test_beyond_the_rank_is_nothing() -> None:
    R = torch.outer(torch.arange(4.0), torch.ones(3)).double()
    A, B = low_rank(R, 6)
    assert A.shape == (6, 3) and B.shape == (4, 6) and not A[1:].any() and not B[:, 1:].any()
    torch.testing.assert_close(B @ A, R)
    A, B = low_rank(torch.zeros(4, 3).double(), 2)
    assert not A.any() and not B.any()


def test_a_run_starts_nearer_to_the_original(dense: Path, examples: Path, tmp_path: Path) -> None:
    ids = torch.arange(3, 99).view(2, 48)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    notes: list[str] = []
    out = tmp_path / "tuned"
    finetune(
        dense,
        out,
        examples,
        grid="nf4",
        adapter=Adapter(r=24, alpha=12, init="residual"),
        rows=Rows(64),
        training=Training(steps=1, lr=1e-12),
        on_event=lambda e: notes.append(str(e.get("message"))),
    )
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(out / "base")
    share = next(float(n.split("%")[0].split()[-1]) for n in notes if "rounding lost" in n)
    assert 40 < share < 100
    want, base = logits(fewbits.load(dense)[0]), logits(fewbits.load(out / "base")[0])
    began = logits(load_adapter(fewbits.load(out / "base")[0], out))
    assert (began - want).norm() < 0.8 * (base - want).norm()


def test_gathering_in_several_passes_changes_nothing(
    dense: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for at_once in (residual.AT_ONCE, 1):
        monkeypatch.setattr(residual, "AT_ONCE", at_once)
        out = tmp_path / str(at_once)
        adapter, training = Adapter(r=4, dropout=0.5, init="residual"), Training(steps=1, lr=1e-12)
        finetune(dense, out, examples, grid="nf4", adapter=adapter, rows=Rows(64), training=training)
        found.append(load_file(out / "adapter_model.safetensors"))
    assert all(torch.allclose(t, found[1][name], atol=1e-6) for name, t in found[0].items())


def test_values_are_weighed_as_attention_mixes_them(
    dense: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gram matrix of every layer, against inputs recorded in the base, and for values mixed by its attention."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(residual, "low_rank", lambda R, r, C: (seen.append((R, C @ C.T)), low_rank(R, r, C))[1])
    rows, training = Rows(64), Training(steps=1, lr=1e-12)
    adapter = Adapter(r=4, init="residual")
    finetune(dense, tmp_path / "out", examples, grid="nf4", adapter=adapter, rows=rows, training=training)
    model, tokenizer = fewbits.load(tmp_path / "out" / "base", dtype=torch.float32)
    want: dict[str, torch.Tensor] = {}

    def record(name: str, mixing: Mixing, layer: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        x = mixing(given[0]) if name.endswith("v_proj") else given[0]
        assert x is not None
        x = x.reshape(-1, x.shape[-1]).double()
        want[name] = want.get(name, 0) + x.T @ x

    with ExitStack() as stack:
        for i, block in enumerate(model.model.layers):
            mixing = Mixing(block, "self_attn.v_proj")
            stack.enter_context(mixing.watched())
            for name, layer in block.named_modules():
                if isinstance(layer, QuantLinear):
                    layer.register_forward_pre_hook(partial(record, f"{i}.{name}", mixing))
        observe(model, {}, read(examples, tokenizer, rows))
    assert len(want) == len(seen)
    original = fewbits.load(dense, dtype=torch.float32)[0].model.layers
    for name, G in want.items():
        W, Q = original.get_submodule(name).weight, model.model.layers.get_submodule(name).dequantize()
        found = [g for R, g in seen if R.shape == W.shape and torch.allclose(R, (W - Q).double(), atol=1e-6)]
        assert len(found) == 1 and (found[0] - G).norm() < 1e-4 * G.norm(), name


def test_what_it_cannot_begin_from(dense: Path, examples: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="allowed: zero, residual"):
        Adapter(init="pissa")
    with pytest.raises(RequestError, match="one of the two"):
        Adapter(init="residual", dora=True)
    for method, source in (("lora", dense), ("qlora", tmp_path / "q")):
        if method == "qlora":
            fewbits.quantize(dense, source, method="rtn", group_size=32)
        with pytest.raises(RequestError, match="is not rounded here"):
            finetune(source, tmp_path / "o", examples, method=method, adapter=Adapter(init="residual"), rows=Rows(64))
        assert not (tmp_path / "o").exists()
