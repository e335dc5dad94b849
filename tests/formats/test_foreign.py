"""compressed-tensors' own code, and transformers, on the tensors that we write."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fewbits import formats, storage
from fewbits.formats import Entry
from fewbits.grids import Int, groups_of
from fewbits.tensor import Quantized

pytest.importorskip("compressed_tensors")
IDS = torch.arange(24).reshape(2, 12)
NAME = "model.layers.0.mlp.up_proj"


def quantized(grid: Int, shape: tuple[int, int], seed: int = 0, scattered: bool = False) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    shared = (1 if grid.rows == -1 else shape[0], groups_of(shape[1], grid.group))
    params = {"scale": (0.01 * torch.rand(shared, generator=g) + 0.005).to(grid.dtype)}
    if not grid.symmetric:
        params["zero"] = torch.randint(0, grid.qmax + 1, shared, generator=g).to(torch.uint8)
    if scattered:
        params["g_idx"] = grid.index(params, shape[1]).int()[torch.randperm(shape[1], generator=g)]
    return Quantized(grid, torch.randint(0, grid.qmax + 1, shape, generator=g).to(torch.uint8), params)


GRIDS = [Int(b, g, 1, s, "float32") for b in (2, 3, 4, 8) for g in (32, -1) for s in (True, False)]
GRIDS += [Int(b, -1, -1, s, "float32") for b in (4, 8) for s in (True, False)]
GRIDS += [Int(b, 32, 1, s, dtype) for b in (4, 8) for s in (True, False) for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_their_compressor_reads_and_writes_the_same(grid: Int) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Theirs
    from compressed_tensors.quantization import QuantizationConfig

    q = quantized(grid, (64, 128))
    entries = [Entry(NAME, q.shape, grid)]
    layout = formats.writer("compressed-tensors", entries)
    ours = {k.removeprefix(NAME + "."): v for k, v in layout.pack(NAME, q).items()}
    scheme = QuantizationConfig.model_validate(layout.config(entries)).config_groups["group_0"]

    weight = Theirs.decompress(ours, scheme)["weight"]
    assert weight.dtype == grid.dtype and torch.equal(weight, q.dense().to(grid.dtype))

    if grid.scale != "float32":
        return  # in 16 bits their own rounding of weight / scale need not find our codes again
    zero = (q.params["zero"].to(torch.int16) - grid.middle).to(torch.int8) if "zero" in q.params else None
    state = {"weight": weight, "weight_scale": ours["weight_scale"]}
    if zero is not None:
        state["weight_zero_point"] = zero.reshape(-1) if grid.rows == -1 else zero
    theirs = Theirs.compress(state, scheme)
    assert theirs.keys() == ours.keys()
    for key in ours:
        assert torch.equal(theirs[key], ours[key]) and theirs[key].dtype == ours[key].dtype


def llama(path: Path, grids: dict[str, Int | None], name: str, scattered: bool = False) -> torch.nn.Module:
    """Write a tiny Llama quantized by ``grids`` (by the last part of a name) to ``path``; return its dense twin."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).float().eval()
    entries, tensors, packed = [], dict(model.state_dict()), {}
    tensors.pop("lm_head.weight")
    for i, (module_name, module) in enumerate(model.named_modules()):
        last = module_name.split(".")[-1]
        if not isinstance(module, torch.nn.Linear) or last == "lm_head":
            continue
        entries.append(Entry(module_name, tuple(module.weight.shape), grids.get(last, grids[""]), scattered))
        if entries[-1].grid is not None:
            packed[module_name] = quantized(entries[-1].grid, entries[-1].shape, i, scattered)
            module.weight.data = packed[module_name].dense()
            tensors.pop(module_name + ".weight")
    layout = formats.writer(name, entries)
    for module_name, q in packed.items():
        tensors |= layout.pack(module_name, q)
    storage.save(path / "model.safetensors", tensors)
    written = config.to_dict() | {"dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(written | {"quantization_config": layout.config(entries)}))
    for file, text in layout.files(entries).items():
        (path / file).write_text(text)
    return model


@pytest.mark.parametrize(
    "grids",
    [
        {"": Int(4, 32, 1, True, "float32")},
        {"": Int(4, 32, 1, False, "float32")},
        {"": Int(3, 32, 1, False, "float32")},
        {"": Int(2, -1, 1, True, "float32")},
        {"": Int(8, -1, 1, True, "float32")},
        {"": Int(4, -1, 1, False, "float32"), "v_proj": None},
        {"": Int(4, 32, 1, True, "float32"), "down_proj": Int(8, -1, 1, True, "float32"), "v_proj": None},
    ],
    ids=str,
)
def test_transformers_loads_it_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grids: dict[str, Int | None]
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("FEWBITS_PLUGIN", "0")
    dense = llama(tmp_path, grids, "compressed-tensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert not any(type(m).__name__ == "QuantLinear" for m in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, dense(IDS).logits)


GPTQMODEL = os.environ.get("FEWBITS_GPTQMODEL_PYTHON")  # an interpreter with gptqmodel, optimum and transformers
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map="cpu").eval()
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "qweight")}
    with torch.no_grad():
        logits = model(torch.arange(24).reshape(2, 12)).logits.float()
    torch.save({"logits": logits, "kinds": kinds}, path + "/logits.pt")
"""

LOADED = {
    "gptq-4-symmetric": ("gptq", {"": Int(4, 32, symmetric=True)}, False),
    "gptq-4-affine": ("gptq", {"": Int(4, 32)}, False),
    "gptq-2-affine": ("gptq", {"": Int(2, 32)}, False),
    "gptq-3-symmetric": ("gptq", {"": Int(3, 32, symmetric=True)}, False),
    "gptq-3-affine": ("gptq", {"": Int(3, 32)}, False),
    "gptq-8-affine": ("gptq", {"": Int(8, -1)}, False),
    "gptq-4-short-last-group": ("gptq", {"": Int(4, 128)}, False),
    "gptq-4-scattered": ("gptq", {"": Int(4, 32)}, True),
    "gptq-4-some-dense": ("gptq", {"": Int(4, 32, symmetric=True), "v_proj": None}, False),
    "awq-symmetric": ("awq", {"": Int(4, 32, symmetric=True)}, False),
    "awq-affine": ("awq", {"": Int(4, 32)}, False),
    "awq-some-dense": ("awq", {"": Int(4, 32), "gate_proj": None}, False),
}


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.slow
@pytest.mark.skipif(not GPTQMODEL, reason="set FEWBITS_GPTQMODEL_PYTHON to a Python that has gptqmodel")
def test_gptqmodel_computes_the_same(tmp_path: Path) -> None:
    expected = {}
    for case, (name, grids, scattered) in LOADED.items():
        (tmp_path / case).mkdir()
        dense = llama(tmp_path / case, grids, name, scattered)
        with torch.no_grad():
            exact = dense(IDS).logits
            expected[case] = exact, relative(dense.half()(IDS).logits, exact)
    paths = [str(tmp_path / case) for case in LOADED]
    subprocess.run([str(GPTQMODEL), "-c", LOAD, *paths], check=True, timeout=900)
    for case, (exact, half) in expected.items():
        found = torch.load(tmp_path / case / "logits.pt", weights_only=True)
        error = relative(found["logits"], exact)
        assert found["kinds"] and error < 1.5 * half, f"{case}: error {error}, {half} in float16, by {found['kinds']}"
