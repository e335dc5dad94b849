"""W8A8 as compressed-tensors itself writes and runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import api, formats, load
from fewbits.activations import PRESETS, Activations, Inputs
from fewbits.errors import CheckpointError
from fewbits.formats import Entry
from fewbits.grids import Int
from fewbits.runtime.linear import QuantLinear
from fewbits.tensor import Quantized
from tests.pipeline.test_quantize import SMALL, make

pytest.importorskip("compressed_tensors")
NAME = "model.layers.0.mlp.up_proj"
FULL = {name: replace(PRESETS[name], narrow=False) for name in ("int8", "int8-static", "int4")}
GRIDS = [Int(8, -1, 1, True, "float32"), Int(8, -1, 1, False, "float32"), Int(8, -1, -1, True, "float32")]
GRIDS += [Int(8, -1, 1, True, "bfloat16"), Int(8, 32, 1, True, "float32")]


def packed(grid: Int, scheme: Activations, seed: int = 0) -> tuple[Quantized, dict[str, Any], dict[str, torch.Tensor]]:
    w = torch.randn(48, 96, generator=torch.Generator().manual_seed(seed))
    p = grid.fit(w)
    scale = None if scheme.dynamic else torch.tensor([0.125])
    q = Quantized(grid, grid.encode(w, p), p, inputs=Inputs(scheme, scale))
    entries = [Entry(NAME, q.shape, grid, activations=scheme)]
    layout = formats.writer("compressed-tensors", entries)
    return q, layout.config(entries), layout.pack(NAME, q)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["int8", "int8-static"])
def test_round_trip(grid: Int, name: str) -> None:
    q, config, tensors = packed(grid, PRESETS[name])
    assert config["format"] == "int-quantized" and tensors[f"{NAME}.weight"].dtype == torch.int8
    found = formats.detect(config).unpack(NAME, {k.removeprefix(NAME + "."): t for k, t in tensors.items()})
    assert torch.equal(found.codes, q.codes) and torch.equal(found.dense(), q.dense())
    assert found.inputs is not None and found.inputs.scheme == PRESETS[name]
    assert (found.inputs.scale is None) == PRESETS[name].dynamic
    assert found.inputs.scale is None or float(found.inputs.scale) == 0.125


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_their_compressor_writes_the_same_bytes(grid: Int) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    q, config, tensors = packed(grid, FULL["int8"])
    ours = {k.removeprefix(NAME + "."): t for k, t in tensors.items()}
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    theirs = BaseCompressor.get_value_from_registry("int-quantized")
    weight = theirs.decompress(dict(ours), scheme)["weight"]
    assert torch.equal(weight, q.dense().to(weight.dtype))
    if grid.scale == "float32":
        again = theirs.compress(dict(ours) | {"weight": weight}, scheme)
        assert torch.equal(again["weight"], ours["weight"]) and again["weight"].dtype == torch.int8


def test_scale_and_codes_of_round_to_nearest_are_theirs() -> None:
    """Their observer's scale for the largest magnitude, their rounding: what llm-compressor's RTN writes."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    w, grid = torch.randn(48, 96, generator=torch.Generator().manual_seed(3)), GRIDS[0]
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scale, zero = calculate_qparams(w.amin(1, keepdim=True), w.amax(1, keepdim=True), args)
    p = grid.fit(w)
    assert torch.allclose(p["scale"], scale, rtol=2e-7)
    codes = quantize(w, p["scale"], zero, args, dtype=torch.int8)
    assert torch.equal(grid.encode(w, p).int() - 128, codes.int())


@pytest.mark.parametrize("name", FULL)
def test_their_arithmetic_on_inputs(name: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = FULL[name]
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    strategy = "token" if scheme.dynamic else "tensor"
    args = QuantizationArgs(num_bits=8 if "8" in name else 4, symmetric=True, strategy=strategy, dynamic=scheme.dynamic)
    low, high = (x.amin(1, keepdim=True), x.amax(1, keepdim=True)) if scheme.dynamic else (x.min(), x.max())
    scale, zero = calculate_qparams(low.reshape(-1, 1), high.reshape(-1, 1), args)
    ours = Inputs(scheme, None if scheme.dynamic else scale.reshape(1))(x)
    assert torch.allclose(ours, fake_quantize(x, scale, zero, args), atol=1e-6)


@pytest.mark.parametrize(
    ("case", "given"),
    {
        "w8a8": {"method": "w8a8", "activations": FULL["int8"]},
        "smoothquant-static": {"method": "smoothquant-static", "activations": FULL["int8-static"]},
        "w4a8": {"method": "smoothquant+gptq", "group_size": 32, "activations": FULL["int8"]},
    }.items(),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_transformers_and_compressed_tensors_compute_the_same(
    case: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    source, out = make("llama", tmp_path / "model"), tmp_path / "out"
    api.quantize(source, out, **(SMALL | {"samples": 4, "dtype": "float32", "group_size": -1} | given))
    ids = torch.arange(5, 29).reshape(2, 12)
    ours, _ = load(out, dtype=torch.float32)
    for m in ours.modules():  # the file does not say which of the two integer ranges
        if isinstance(m, QuantLinear) and m.inputs is not None:
            m.inputs = Inputs(replace(m.inputs.scheme, narrow=False), m.inputs.scale)
    monkeypatch.setenv("FEWBITS_PLUGIN", "0")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert not any(isinstance(m, QuantLinear) for m in theirs.modules())
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    assert torch.allclose(a, b, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(48, 96)}, "is torch.float32"),
        ({"weight": torch.zeros(96, dtype=torch.int8)}, r"expected \[out, in\]"),
        ({"weight_scale": torch.ones(47, 1)}, "weight_scale has shape"),
        ({"weight_scale": torch.full((48, 1), float("nan"))}, "not finite"),
        ({"input_scale": torch.zeros(1)}, "not one positive number"),
        ({"input_scale": None}, "input_scale is missing"),
    ],
)
def test_damage_is_named(change: dict[str, Any], message: str) -> None:
    _, config, tensors = packed(GRIDS[0], PRESETS["int8-static"])
    given: dict[str, Any] = {k.removeprefix(NAME + "."): t for k, t in tensors.items()} | change
    with pytest.raises(CheckpointError, match=message):
        formats.detect(config).unpack(NAME, {k: t for k, t in given.items() if t is not None})


def test_cache_scheme_is_theirs(tmp_path: Path) -> None:
    import json

    from compressed_tensors.quantization import QuantizationConfig

    api.quantize(
        make("llama", tmp_path / "m"), tmp_path / "out", method="w8a8", kv_cache="fp8", **(SMALL | {"group_size": -1})
    )
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    found = QuantizationConfig.model_validate(written).kv_cache_scheme
    assert found is not None and (found.num_bits, found.type, found.strategy, found.dynamic) == (
        8,
        "float",
        "tensor",
        False,
    )
