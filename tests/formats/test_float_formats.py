"""FP8, MX, NVFP4 checkpoints: the bytes of compressed-tensors' own writer, foreign and own readers; solvers on NF4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import formats
from fewbits.activations import PRESETS, Inputs
from fewbits.errors import CheckpointError, Refused, RequestError
from fewbits.formats import Entry, bitpack
from fewbits.grids import NAMED_GRIDS, Float
from fewbits.storage import Checkpoint
from fewbits.tensor import Quantized
from tests.tiny import tiny_model, tiny_tokenizer

NAME = "model.layers.0.mlp.up_proj"
FOREIGN = ("fp8", "fp8-tensor", "fp8-block", "mxfp8", "mxfp6", "mxfp4", "nvfp4")
EVERY = [n for n, g in NAMED_GRIDS.items() if isinstance(g, Float)]
IDS = torch.arange(24).reshape(2, 12)


def weight(rows: int = 256, columns: int = 256) -> torch.Tensor:
    w = 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    w[3, 32:64] = 0
    w[5, 64:96] *= 1e-4
    return w


def quantized(grid: Float, w: torch.Tensor) -> Quantized:
    p = grid.fit(w)
    return Quantized(grid, grid.encode(w, p), p)


def through(name: str, q: Quantized) -> tuple[dict[str, torch.Tensor], Quantized]:
    entries = [Entry(NAME, q.shape, q.grid)]
    layout = formats.writer(name, entries)
    tensors = {k.removeprefix(f"{NAME}."): v for k, v in layout.pack(NAME, q).items()}
    assert all(t.is_contiguous() for t in tensors.values()) and set(tensors) <= layout.suffixes
    return tensors, formats.detect(json.loads(json.dumps(layout.config(entries)))).unpack(NAME, tensors)


CASES = [("fewbits", n, (40, 96)) for n in EVERY] + [("compressed-tensors", n, (256, 256)) for n in FOREIGN]


@pytest.mark.parametrize(
    "layout, name, shape", [*CASES, ("fewbits", "fp8-block", (130, 260)), ("fewbits", "nvfp4", (7, 33))]
)
def test_what_was_packed_comes_back_and_bits_counted_are_bits_written(
    layout: str, name: str, shape: tuple[int, int]
) -> None:
    q = quantized(NAMED_GRIDS[name], weight(*shape))
    tensors, back = through(layout, q)
    assert back.grid == q.grid and torch.equal(back.codes, q.codes) and torch.equal(back.dense(), q.dense())
    assert all(torch.equal(back.params[k].float(), p.float()) for k, p in q.params.items())
    if shape[1] % 32 == 0:
        written = sum(8 * t.numel() * t.element_size() for t in tensors.values())
        assert written == pytest.approx(q.grid.cost(q.shape) * q.codes.numel())


def test_nibbles() -> None:
    """[0.5, 6] are codes 1 and 7: the even column lies in the low nibble, 0x71. Six bits: four codes in three bytes."""
    assert bitpack.to_bytes(torch.tensor([[1, 7, 15, 0]]), 4).tolist() == [[0x71, 0x0F]]
    assert bitpack.to_bytes(torch.tensor([[1, 2, 3, 63]]), 6).tolist() == [[0x81, 0x30, 0xFC]]


def their_parameters(w: torch.Tensor, args: Any) -> dict[str, torch.Tensor]:
    """Scales of ``w`` as llm-compressor's minmax observer has compressed-tensors compute them."""
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    rows, columns = {
        "tensor": w.shape,
        "channel": (1, w.shape[1]),
        "block": tuple(args.block_structure or ()),
    }.get(str(args.strategy), (1, args.group_size))
    tiles = w.view(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
    low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    if args.strategy == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    shared = generate_gparam(w.min(), w.max()) if args.strategy == "tensor_group" else None
    found = {"weight_scale": calculate_qparams(low, high, args, shared)[0]}
    return found if shared is None else found | {"weight_global_scale": shared}


@pytest.mark.parametrize("name", FOREIGN)
def test_bytes_are_those_of_compressed_tensors(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    w = weight()
    q = quantized(NAMED_GRIDS[name], w)
    entries = [Entry(NAME, q.shape, q.grid)]
    layout = formats.writer("compressed-tensors", entries)
    config = layout.config(entries)
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    theirs = BaseCompressor.get_value_from_registry(config["format"])
    ours = {k.removeprefix(NAME + "."): v for k, v in layout.pack(NAME, q).items()}
    expected = theirs.compress({"weight": w.clone()} | their_parameters(w, scheme.weights), scheme)
    assert expected.keys() == ours.keys()
    for key, t in expected.items():
        assert t.dtype == ours[key].dtype and t.shape == ours[key].shape
        assert torch.equal(t.contiguous().view(torch.uint8), ours[key].view(torch.uint8)), key
    back = theirs.decompress(dict(ours), scheme)["weight"]
    assert torch.allclose(back.float(), q.dense(), rtol=2.0**-7 if back.dtype == torch.bfloat16 else 0, atol=0)


def test_negative_zero_keeps_its_sign_here() -> None:
    """The one difference: compressed-tensors turns -0.0 into code 0 of E2M1, we into code 8; both stand for zero."""
    w = torch.ones(1, 32)
    w[0, 1] = -0.0
    assert int(quantized(NAMED_GRIDS["mxfp4"], w).codes[0, 1]) == 8


@pytest.mark.parametrize(
    "grid, shape, why",
    [
        (NAMED_GRIDS["fp4-e3m0"], (64, 64), "no place for e3m0"),
        (NAMED_GRIDS["fp8-e5m2"], (64, 64), "no place for e5m2"),
        (Float("e2m1", 64, scale="e8m0"), (64, 64), "no place for e2m1 in groups of 64"),
        (NAMED_GRIDS["mxfp4"], (64, 80), "multiples of 32"),
        (Float("e4m3", 64, -1), (64, 64), "no place in it"),
    ],
)
def test_refusals(grid: Float, shape: tuple[int, int], why: str) -> None:
    with pytest.raises(Refused, match=why):
        formats.writer("compressed-tensors", [Entry(NAME, shape, grid)])
    with pytest.raises(Refused, match="uniform integers only"):
        formats.writer("gptq", [Entry(NAME, shape, grid)])


@pytest.mark.parametrize("name", FOREIGN)
def test_damage_is_named(name: str) -> None:
    q = quantized(NAMED_GRIDS[name], weight())
    layout = formats.writer("compressed-tensors", [Entry(NAME, q.shape, q.grid)])
    tensors = {k.removeprefix(f"{NAME}."): v for k, v in layout.pack(NAME, q).items()}
    for key in tensors:
        with pytest.raises(CheckpointError, match=key):
            layout.unpack(NAME, {k: v for k, v in tensors.items() if k != key})
    scale = tensors["weight_scale"].clone()
    scale.view(torch.uint8).fill_(255)
    with pytest.raises(CheckpointError, match="weight_scale"):
        layout.unpack(NAME, tensors | {"weight_scale": scale})
    with pytest.raises(CheckpointError, match="weight_scale"):
        layout.unpack(NAME, tensors | {"weight_scale": torch.ones(5, 3).to(scale.dtype)})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "model"
    tiny_model("llama", path, hidden_size=128, intermediate_size=256, vocab_size=320)
    tiny_tokenizer(path)
    return path


TEXT = ["the quick brown fox jumps over the lazy dog and sleeps all day long " * 8] * 4
MADE = [(n, "rtn", "compressed-tensors") for n in FOREIGN] + [
    ("nvfp4", "gptq", "compressed-tensors"),
    ("mxfp4", "awq", "compressed-tensors"),
    ("fp4-e3m0", "gptq-paper", "fewbits"),
    ("nvfp4", "gptq-paper", "fewbits"),
    ("nf4", "gptq", "bitsandbytes"),
    ("nf4-dq", "awq", "bitsandbytes"),
]


@pytest.mark.parametrize("grid, method, layout", MADE)
def test_whole_models(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: str, method: str, layout: str
) -> None:
    """Quantize, count, load by our runtime and by compressed-tensors alone; members of a tie share one global scale."""
    import fewbits
    from fewbits.evaluate import census

    out = tmp_path / "out"
    made: Any = fewbits.quantize(
        source, out, method=method, grid=grid, format=layout, calibration=TEXT, samples=2, seq_len=32, dtype="float32"
    )
    found = census(out, check=True)
    assert found.bits_per_weight == pytest.approx(made.bits_per_weight) and len(found.modules) == made.tensors == 14
    model, _ = fewbits.load(out)
    with torch.no_grad():
        ours = model(IDS).logits
    assert len(model.generate(IDS[:1], max_new_tokens=3, do_sample=False)[0]) == 15
    if grid == "nvfp4":
        stored, part = Checkpoint.open(out), "weight_global_scale" if layout == "compressed-tensors" else "global"
        name = "model.layers.1.{}." + part
        for tie in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            owner = "self_attn" if "q_proj" in tie else "mlp"
            assert len({float(stored.tensor(name.format(f"{owner}.{n}"))) for n in tie}) == 1
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        from transformers import AutoModelForCausalLM

        monkeypatch.setenv("FEWBITS_PLUGIN", "0")
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert not any(type(m).__name__ == "QuantLinear" for m in theirs.modules())
        with torch.no_grad():
            foreign = theirs(IDS).logits
        assert float((foreign - ours).abs().max()) <= (1e-2 if grid == "nvfp4" else 1e-3) * float(
            ours.max() - ours.min()
        )


def test_options_that_a_grid_leaves_open(source: Path, tmp_path: Path) -> None:
    import fewbits

    job: Any = fewbits.quantize(source, tmp_path / "a", method="fp8", group_size=64, format="fewbits", dry_run=True)
    assert {e.grid.group for e in job.entries} == {64}
    job = fewbits.quantize(source, tmp_path / "a", method="rtn", grid="int3", group_size=32, dry_run=True)
    assert {(e.grid.bits, e.grid.group) for e in job.entries} == {(3, 32)}
    for options, why in (
        ({"method": "nvfp4", "bits": 8}, "bits 8 given, but method 'nvfp4' has 4"),
        ({"method": "rtn", "grid": "mxfp4", "symmetric": False}, "symmetric False given, but grid 'mxfp4' has no such"),
        ({"method": "rtn", "grid": "nvfp5"}, "did you mean 'nvfp4'"),
    ):
        with pytest.raises(RequestError, match=why):
            fewbits.quantize(source, tmp_path / "a", dry_run=True, **options)


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "mxfp8"])
def test_a_static_scale_of_the_inputs_is_stored(name: str) -> None:
    scheme = PRESETS["fp8-static"]
    q = replace(quantized(NAMED_GRIDS[name], weight()), inputs=Inputs(scheme, torch.tensor([0.125])))
    entries = [Entry(NAME, q.shape, q.grid, activations=scheme)]
    layout = formats.writer("compressed-tensors", entries)
    tensors = {k.removeprefix(f"{NAME}."): v for k, v in layout.pack(NAME, q).items()}
    assert tensors["input_scale"].tolist() == [0.125] and tensors["input_scale"].dtype.is_floating_point
    found = formats.detect(layout.config(entries)).unpack(NAME, tensors).inputs
    assert found is not None and found.scheme == scheme and found.scale is not None and float(found.scale) == 0.125
