"""The census against what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbits import formats, storage
from fewbits.errors import CheckpointError, RequestError
from fewbits.evaluate import census
from fewbits.formats import Entry
from fewbits.grids import Int
from fewbits.tensor import Quantized

SHAPES = {"model.layers.0.self_attn.q_proj": (64, 128), "model.layers.0.mlp.up_proj": (96, 128)}


def write(path: Path, kind: str, grid: Int) -> dict[str, Quantized]:
    """A checkpoint of two quantized modules, an embedding and a norm."""
    entries = [Entry(name, shape, grid) for name, shape in SHAPES.items()]
    layout = formats.writer(kind, entries)
    tensors = {"model.embed_tokens.weight": torch.randn(50, 128).half(), "model.norm.weight": torch.ones(128)}
    made = {}
    for name, shape in SHAPES.items():
        w = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
        params = grid.fit(w)
        made[name] = Quantized(grid, grid.encode(w, params), params)
        tensors |= layout.pack(name, made[name])
    storage.save(path / "model.safetensors", tensors)
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": layout.config(entries)}
    (path / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("kind", sorted(set(formats.LAYOUTS) - {"gguf", "bitsandbytes"}))
def test_bits_and_sizes_are_those_written(tmp_path: Path, kind: str, check: bool) -> None:
    made = write(tmp_path, kind, Int(4, 32, symmetric=kind == "gptq"))
    found = census(tmp_path, check)
    weights = sum(a * b for a, b in SHAPES.values())
    assert found.format == kind
    assert {m.name: m.shape for m in found.modules} == SHAPES
    for module in found.modules:
        assert module.bits_per_weight == pytest.approx(made[module.name].bits_per_weight(), rel=0.05)
        assert module.grid.startswith("int(bits=4, group=32")
    assert found.parameters == weights + 50 * 128 + 128
    model, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    assert found.size_bytes == model.stat().st_size + config.stat().st_size
    stored = sum(size for _, size in found.dtypes.values())
    assert 0 < model.stat().st_size - stored < 8192  # the header
    assert found.bits_per_weight == pytest.approx(
        sum(q.bits_per_weight() * a * b for q, (a, b) in zip(made.values(), SHAPES.values(), strict=True)) / weights,
        rel=0.05,
    )
    json.dumps(found.to_json())


def test_dense(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, 16),
        "model.layers.0.a.weight": torch.randn(8, 16).half(),
        "model.layers.0.b.weight": torch.randn(24, 16),
        "model.norm.weight": torch.ones(16),
    }
    storage.save(tmp_path / "model.safetensors", tensors)
    found = census(tmp_path)
    assert (found.format, found.architecture) == ("dense", None)
    assert [m.name for m in found.modules] == ["model.layers.0.a", "model.layers.0.b"]
    assert found.bits_per_weight == (8 * 16 * 16 + 24 * 16 * 32) / (32 * 16)
    assert found.parameters == 50 * 16 + 8 * 16 + 24 * 16 + 16
    assert found.dtypes == {"float16": (1, 256), "float32": (3, 4 * (50 * 16 + 24 * 16 + 16))}


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        census(tmp_path / "nowhere")
    broken = torch.ones(4, 4)
    broken[1, 2] = float("nan")
    storage.save(tmp_path / "model.safetensors", {"model.layers.0.a.weight": broken})
    census(tmp_path)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.a.weight' holds values that are not finite"):
        census(tmp_path, check=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        census(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        census(tmp_path)
