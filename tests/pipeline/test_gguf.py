"""Mixtures through the whole walk: the file holds what the plan says, and the ways to codes rank as they should."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch

import fewbits
from fewbits.errors import RequestError
from fewbits.formats import gguf
from fewbits.grids import Block
from fewbits.solve import Search, Sweep
from fewbits.solve.search import mean_square
from fewbits.stats import Stats, loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import tiny_model, tiny_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog and sleeps all day long " * 60]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tiny_model("llama", tmp_path_factory.mktemp("m"), hidden_size=256, intermediate_size=320, vocab_size=300)
    tiny_tokenizer(path)
    return path


@pytest.mark.parametrize("method", ["q4_k_m", "q2_k+imatrix", "q3_k_m+gptq", "iq4_xs+awq"])
def test_a_mixture_becomes_one_file_that_loads(model, tmp_path, method):
    result = fewbits.quantize(model, tmp_path / "out", method=method, calibration=TEXTS, samples=4, seq_len=32)
    file = gguf.read(tmp_path / "out" / "model.gguf")
    base = method.split("+")[0].removesuffix("_m")
    assert file.infos["blk.0.ffn_up.weight"].kind == base
    assert file.infos["token_embd.weight"].kind == "q6_k" and file.infos["output_norm.weight"].kind == "f32"
    assert not list((tmp_path / "out").glob("*.safetensors"))
    loaded, tokenizer = fewbits.load(tmp_path / "out")
    assert tokenizer("lazy dog")["input_ids"]
    for t in reference.GGUFReader(tmp_path / "out" / "model.gguf").tensors:
        if t.name.startswith("blk.1.ffn_") and not t.name.endswith("norm.weight"):
            module = loaded.get_submodule(f"model.layers.1.mlp.{t.name.split('.')[2].removeprefix('ffn_')}_proj")
            want = reference.quants.dequantize(t.data, t.tensor_type)
            np.testing.assert_array_equal(module.weight.detach().numpy(), want)
    assert result.bits_per_weight < 6


def test_the_same_run_gives_the_same_bytes(model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fewbits.quantize(model, tmp_path / name / "out", method="q4_k_s")
    first, second = ((tmp_path / n / "out" / "model.gguf").read_bytes() for n in ("a", "b"))
    assert first == second


def test_a_uniform_method_cannot_be_stored(model, tmp_path):
    with pytest.raises(RequestError, match="it stores GGUF's own block types only, not Int"):
        fewbits.quantize(model, tmp_path / "out", method="rtn", format="gguf")
    with pytest.raises(RequestError, match="allowed after the mixture: imatrix, awq, gptq"):
        fewbits.quantize(model, tmp_path / "out", method="q4_k_m+magic")


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "iq4_xs", "q4_0"])
def test_ways_to_codes_rank(kind):
    """Output error on correlated inputs: importance beats none, the sweep beats importance."""
    torch.manual_seed(0)
    x = torch.randn(2048, 512) @ (torch.randn(512, 512) * 0.1 + torch.eye(512)) * torch.logspace(-1, 0.5, 512)
    stats = Stats.empty(512)
    stats.update(x)
    w, grid = torch.randn(64, 512) * 0.05, Block(kind)
    solvers = (Search(), Search(importance=True), Sweep(order="activation", static=True), Sweep())
    plain, weighted, static, flowing = (float(loss(s(w, grid, stats).dense() - w, stats.gram)) for s in solvers)
    assert weighted < plain
    assert static < 0.9 * weighted and flowing < 0.95 * weighted


def test_mean_squares_are_those_of_the_inputs():
    stats = Stats.empty(3)
    stats.update(torch.tensor([[1.0, 0.0, 3.0], [3.0, 0.0, 1.0]]))
    assert mean_square(stats).tolist() == [5.0, 5.0, 5.0]


def test_the_plan_says_what_each_weight_becomes_and_gives_the_same_bytes_again(model, tmp_path):
    from fewbits.plan import Plan

    fewbits.quantize(model, tmp_path / "a", method="q4_k_m")
    text = (tmp_path / "a" / "fewbits_plan.yaml").read_text()
    plan = Plan.from_yaml(text)
    assert plan.to_yaml() == text
    assert plan.assign([r.match for r in plan.rules[:-1]] + ["x"])["model.layers.1.mlp.down_proj"].grid == Block("q8_0")
    assert [(r.match, r.recipe.grid.name) for r in plan.outside] == [("model.embed_tokens", "q6_k")]
    fewbits.quantize(model, tmp_path / "b", recipe=tmp_path / "a" / "fewbits_plan.yaml", format="gguf")
    first, second = (gguf.read(tmp_path / n / "model.gguf") for n in "ab")
    assert all(torch.equal(first.raw(n), second.raw(n)) for n in first.infos)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_become_one_tensor(family, tmp_path):
    """Each expert's rows in the file are those of its own weight, in the order of their numbers; the router stays."""
    from fewbits.formats.gguf_model import encode
    from fewbits.storage import Checkpoint

    sizes = {"mlp_only_layers": []} if family == "qwen3_moe" else {}
    source = tiny_model(family, tmp_path / "model", vocab_size=300, **sizes)
    tiny_tokenizer(source)
    fewbits.quantize(source, tmp_path / "out", method="q4_k_m")
    file, weights = gguf.read(tmp_path / "out" / "model.gguf"), Checkpoint.open(source)
    names = (
        ("block_sparse_moe", "w1", "w2", "w3") if family == "mixtral" else ("mlp", "gate_proj", "down_proj", "up_proj")
    )
    for role, local in zip(("gate", "down", "up"), names[1:], strict=True):
        info = file.infos[f"blk.1.ffn_{role}_exps.weight"]
        each = [weights.tensor(f"model.layers.1.{names[0]}.experts.{e}.{local}.weight").float() for e in range(4)]
        assert info.shape == (4, *each[0].shape) and info.kind in ("q5_0", "q8_0")
        want = torch.cat([encode(w, info.kind).reshape(-1) for w in each])
        assert torch.equal(file.raw(info.name), want)
    router = weights.tensor(f"model.layers.1.{names[0]}.gate.weight").float()
    assert torch.equal(file.tensor("blk.1.ffn_gate_inp.weight"), router)
    loaded, _ = fewbits.load(tmp_path / "out")
    assert torch.isfinite(loaded(torch.arange(3, 20)[None]).logits).all()
