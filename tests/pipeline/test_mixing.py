"""What attention makes of its inputs: an error of the weights that make values reaches its output as that says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewbits import api
from fewbits.methods import METHODS
from fewbits.model import Source, get_weight
from fewbits.pipeline.mixing import Mixing
from fewbits.stats import Stats
from fewbits.storage import Checkpoint
from tests.pipeline.test_quantize import SMALL, make
from tests.tiny import FAMILIES, tiny_model

TOKENS = 24
FAMILIES = [f for f in FAMILIES if f not in ("phi3", "gpt2")]  # whose values come out of a fused layer


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_error_of_values_reaches_each_head_as_its_mixed_inputs_say(family, tmp_path):
    """By the change of what the layer after attention reads, for every kept query of every head; masks of sliding
    windows, grouped queries, norms of queries and keys, and learned positions included.
    """
    source = Source.open(tiny_model(family, tmp_path, torch.float32))
    block = source.block(0)
    value, heads = source.family.values, source.text_config.num_attention_heads
    w = get_weight(block.get_submodule(value))
    dim = block.self_attn.head_dim
    repeat = heads * dim // len(w)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, w.shape[1], generator=g)
    inputs, outputs = [], []
    out = "self_attn.out_proj" if family == "opt" else "self_attn.o_proj"
    block.get_submodule(value).register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    block.get_submodule(out).register_forward_pre_hook(lambda m, a: outputs.append(a[0]))
    mixing = Mixing(block, value)
    kwargs = source.block_kwargs(TOKENS)[0]
    with mixing.watched():
        block(x, **kwargs)
    found = mixing(inputs[0])
    error = torch.randn(w.shape, generator=g)
    w.add_(error)
    block(x, **kwargs)
    at = torch.arange(heads - 1, TOKENS, heads)
    assert found.shape == (2, heads, len(at), inputs[0].shape[-1])
    change = (outputs[1] - outputs[0])[:, at].view(2, len(at), heads, dim)
    for h in range(heads):
        mine = error[h // repeat * dim : (h // repeat + 1) * dim]
        torch.testing.assert_close(found[:, h] @ mine.T, change[:, :, h], rtol=0, atol=1e-4)


def test_values_are_solved_for_what_is_mixed():
    g = torch.Generator().manual_seed(1)
    x, original, mixed, mixed_original = (torch.randn(n, 8, generator=g).bfloat16() for n in (64, 64, 48, 48))
    stats = Stats.empty(8, frozenset({"gram", "cross"}))
    assert stats.of_values() is stats
    stats.update(x, original=original, mixed=mixed, mixed_original=mixed_original)
    values = stats.of_values()
    torch.testing.assert_close(values.gram, mixed.float().T @ mixed.float())
    change = (mixed_original.float() - mixed.float()).bfloat16().float()
    torch.testing.assert_close(values.change, change.T @ mixed.float())
    s = torch.rand(8, generator=g) + 0.5
    torch.testing.assert_close(stats.scaled(s).of_values().gram, values.gram * s * s[:, None])
    torch.testing.assert_close((stats + stats).of_values().gram, 2 * values.gram)
    torch.testing.assert_close((stats + stats).of_values().change, 2 * values.change)


@pytest.fixture
def model(tmp_path):
    return make("qwen2", tmp_path / "model", num_hidden_layers=1)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_the_walk_solves_values_and_nothing_beside_them_for_it(method, model, tmp_path, monkeypatch):
    """Queries and keys read the same input and keep their codes; what follows attention sees other values."""
    own, found = METHODS[method], {}
    for mixed in (True, False):
        monkeypatch.setitem(METHODS, method, replace(own, solver=replace(own.solver, mixed=mixed)))
        out = tmp_path / str(mixed)
        api.quantize(model, out, method=method, bits=3, format="fewbits", **SMALL)
        found[mixed] = Checkpoint.open(out)
    names = found[True].names()
    assert own.solver.mixed and names == found[False].names()
    changed = {n for n in names if not torch.equal(found[True].tensor(n), found[False].tensor(n))}
    assert any("v_proj" in n for n in changed) and not any(".q_proj" in n or ".k_proj" in n for n in changed)


def test_attention_that_cannot_be_read_is_told_of(model, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(Mixing, "__call__", lambda self, x, steady: None)
    api.quantize(
        model, tmp_path / "out", method="gptq", **SMALL, on_event=lambda e: notes.append(str(e.get("message")))
    )
    assert sum("v_proj" in n and "plain inputs" in n for n in notes) == 1
