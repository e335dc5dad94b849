"""Conversions: the same numbers in another format, proved by dequantizing both; or a refusal that says what is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewbits import api
from fewbits.cli import main
from fewbits.errors import RequestError
from fewbits.formats import gguf, gguf_import, gguf_model
from fewbits.formats.carry import twins
from fewbits.formats.convert import convert
from fewbits.formats.quantized import open_reader
from fewbits.grids import Block, Float, Int, Table, Vectorwise, groups_of
from fewbits.model import Source
from fewbits.solve import Search
from fewbits.storage import Checkpoint
from fewbits.tensor import Quantized
from tests.tiny import tiny_model, tiny_tokenizer


def quantized(grid: Any, shape: tuple[int, int] = (16, 128), seed: int = 0) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * 0.02
    if isinstance(grid, Block):
        return Search()(w, grid, None)
    p = grid.fit(w)
    return Quantized(grid, grid.encode(w, p), p)


# ---- twins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "wanted"),
    [
        (Int(4, 32, symmetric=True), {Block("q4_0"), Block("q5_0"), Block("q8_0"), Int(8, 32, symmetric=True)}),
        (Int(4, 64, symmetric=True), {Block("q4_0"), Block("q4_1")}),
        (Int(4, -1, symmetric=True), {Block("q4_0"), Vectorwise()}),
        (Int(8, 32, symmetric=True), {Block("q8_0")}),
        (Int(5, 32, symmetric=True), {Block("q5_0"), Int(8, 32, symmetric=True)}),
        (Int(3, 32, symmetric=True), {Int(4, 32, symmetric=True), Block("q4_0")}),
        (Int(3, 32), {Int(4, 32)}),
        (Int(4, 32), {Block("q5_0"), Int(8, 32)}),  # each code with its zero taken off needs a fifth bit
        (Int(2, 32), {Int(4, 32), Block("q4_0")}),
        (Block("q4_0"), {Int(4, 32, symmetric=True)}),
        (Block("q8_0"), {Int(8, 32, symmetric=True)}),
        (Block("mxfp4"), {Float("e2m1", 32, scale="e8m0")}),
        (Float("e2m1", 32, scale="e8m0"), {Block("mxfp4")}),
        (Vectorwise(), {Int(8, -1, symmetric=True, scale="float32")}),
    ],
    ids=lambda v: " ".join(sorted(map(str, v))) if isinstance(v, set) else str(v),
)
def test_twins_are_equal_to_the_bit(grid, wanted):
    q = quantized(grid)
    found = list(twins(q))
    assert found[0] is q and wanted <= {t.grid for t in found}
    for t in found:
        assert torch.equal(t.dense(), q.dense()) and t.shape == q.shape


@pytest.mark.parametrize(
    "grid", [Block("q4_k"), Block("q6_k"), Block("iq4_nl"), Table("nf4", 64), Float("e4m3")], ids=str
)
def test_others_have_no_twin(grid):
    assert [t.grid for t in twins(quantized(grid, (8, 256)))] == [grid]


def test_an_offset_that_half_precision_holds_is_a_twin():
    """``m = -z s``: exact for scales of few digits, not for others."""
    shape = (8, 64)
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    zero = torch.randint(0, 16, (8, 2), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    short = Quantized(Int(4, 32), codes, {"scale": torch.full((8, 2), 2.0**-6 * 1.25).half(), "zero": zero})
    assert Block("q4_1") in {t.grid for t in twins(short)}
    q = next(t for t in twins(short) if t.grid == Block("q4_1"))
    assert Int(4, 32) in {t.grid for t in twins(q)}
    zero[0, 0] = 7
    long = Quantized(Int(4, 32), codes, {"scale": torch.full((8, 2), 0.0101).half(), "zero": zero})
    assert Block("q4_1") not in {t.grid for t in twins(long)}


def test_scattered_groups_stay_integers():
    q = quantized(Int(4, 32, symmetric=True))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    q = Quantized(q.grid, q.codes, q.params | {"g_idx": q.grid.index(q.params, 128)[order].int()})
    assert all(isinstance(t.grid, Int) for t in twins(q))
    assert all(torch.equal(t.dense(), q.dense()) for t in twins(q))


def test_rows_need_a_code_for_every_weight():
    """LLM.int8() has no -128, so a full range is no twin."""
    codes = torch.tensor([[0, 255, 128, 100]], dtype=torch.uint8)
    q = Quantized(Int(8, -1, symmetric=True), codes, {"scale": torch.tensor([[0.01]]).half()})
    assert Vectorwise() not in {t.grid for t in twins(q)}
    codes[0, 0] = 1
    assert groups_of(4, -1) == 1 and Vectorwise() in {t.grid for t in twins(q)}


# ---- whole checkpoints -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", path, torch.float16, hidden_size=64, intermediate_size=96, vocab_size=300)
    tiny_tokenizer(path)
    return path


MADE: dict[str, dict[str, Any]] = {
    "gptq": {"method": "rtn", "format": "gptq", "bits": 4, "group_size": 32, "symmetric": True},
    "gptq-affine": {"method": "rtn", "format": "gptq", "bits": 4, "group_size": 32},
    "awq": {"method": "rtn", "format": "awq", "bits": 4, "group_size": 32},
    "ct": {"method": "rtn", "format": "compressed-tensors", "bits": 4, "group_size": 32, "symmetric": True},
    "int8": {"method": "rtn", "format": "fewbits", "bits": 8, "group_size": 32, "symmetric": True},
    "llm.int8": {"method": "llm.int8"},
    "nf4": {"method": "nf4"},
    "q4_0": {"method": "q4_0"},
    "q8_0": {"method": "q8_0"},
    "w8a8": {"method": "w8a8"},
}


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("made")

    def get(name: str) -> Path:
        path = folder / name.replace(".", "-")
        if not path.exists():
            api.quantize(source, path, **MADE[name])
        return path

    return get


def dense(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as float32 numbers, by transformers' names."""
    reader = open_reader(path)
    found = {f"{n}.weight": q.dense() for n, q in reader.modules()}
    return found | {n: t.float() for n, t in reader.rest()}


EXACT = [
    ("gptq", "awq"), ("gptq", "compressed-tensors"), ("gptq", "fewbits"), ("gptq", "gguf"),
    ("gptq-affine", "awq"), ("gptq-affine", "compressed-tensors"), ("gptq-affine", "gguf"),
    ("awq", "gptq"), ("awq", "compressed-tensors"), ("awq", "fewbits"), ("awq", "gguf"),
    ("ct", "gptq"), ("ct", "awq"), ("ct", "gguf"), ("ct", "fewbits"),
    ("int8", "gptq"), ("int8", "gguf"), ("int8", "compressed-tensors"),
    ("q4_0", "gptq"), ("q4_0", "awq"), ("q4_0", "compressed-tensors"), ("q4_0", "fewbits"),
    ("q8_0", "gptq"), ("q8_0", "compressed-tensors"),
    ("llm.int8", "compressed-tensors"), ("llm.int8", "fewbits"), ("nf4", "fewbits"), ("w8a8", "fewbits"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target"), EXACT)
def test_numbers_carry_over(made, tmp_path, name, target):
    out = tmp_path / ("out.gguf" if target == "gguf" else "out")
    found = convert(made(name), out, target)
    assert not found.rounded and found.size_bytes > 0
    before, after = dense(made(name)), dense(out)
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("name", ["gptq", "awq", "llm.int8", "w8a8"])
def test_there_and_back(made, tmp_path, name):
    """Through our own layout and back: the very tensors, names and bytes."""
    home = "bitsandbytes" if name == "llm.int8" else "compressed-tensors" if name == "w8a8" else name
    convert(made(name), tmp_path / "there", "fewbits")
    convert(tmp_path / "there", tmp_path / "back", home)
    a, b = Checkpoint.open(made(name)), Checkpoint.open(tmp_path / "back")
    assert a.names() == b.names()
    for n in a.names():
        assert a.dtype(n) == b.dtype(n) and torch.equal(a.tensor(n), b.tensor(n)), n


def test_transformers_loads_what_was_converted(made, tmp_path):
    import fewbits

    convert(made("q4_0"), tmp_path / "out", "gptq")
    model, tokenizer = fewbits.load(tmp_path / "out", dtype=torch.float32)
    reference, _ = fewbits.load(made("q4_0"))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-4)
    assert tokenizer is not None and model.config.quantization_config is not None


def test_gguf_py_reads_the_same_numbers(made, tmp_path):
    """The oracle for what was written: gguf-py's own decoder, and llama.cpp's order of rotary rows."""
    from gguf import GGUFReader, quants

    convert(made("gptq"), tmp_path / "out.gguf", "gguf")
    tensors = {t.name: t for t in GGUFReader(tmp_path / "out.gguf").tensors}
    t = tensors["blk.1.attn_q.weight"]
    rows = torch.from_numpy(np.array(quants.dequantize(t.data, t.tensor_type)))
    wanted = dense(made("gptq"))["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(rows, wanted[gguf_model.neighbours(64, 4)])
    assert t.tensor_type.name == "Q4_0"


def test_dense_is_exact_in_float32_only(made, tmp_path):
    found = convert(made("gptq"), tmp_path / "out", "transformers")
    assert not found.rounded
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    before, after = dense(made("gptq")), Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(before[n], after.tensor(n).float()) for n in after.names())
    Source.open(tmp_path / "out")
    with pytest.raises(RequestError, match="float16 cannot hold its numbers"):
        convert(made("gptq"), tmp_path / "half", "transformers", torch.float16)
    assert not (tmp_path / "half").exists()
    assert convert(made("gptq"), tmp_path / "half", "transformers", torch.float16, lossy=True).rounded


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("nf4", "gptq", "nothing in it equals table"),
        ("nf4", "gguf", "nothing in it equals table"),
        ("gptq", "bitsandbytes", "nothing in it equals int"),
        ("llm.int8", "gptq", "nothing in it equals vectorwise"),
        ("q8_0", "awq", "nothing in it equals block"),
    ],
)
def test_what_would_be_lost_is_refused(made, tmp_path, name, target, words):
    with pytest.raises(RequestError, match=words) as e:
        convert(made(name), tmp_path / "out", target)
    assert "--lossy" in str(e.value) and "down_proj" in str(e.value)
    assert list(tmp_path.iterdir()) == []
    out = tmp_path / ("out.gguf" if target == "gguf" else "out")
    found = convert(made(name), out, target, lossy=True)
    assert len(found.rounded) == 14 and all(0 < x < 0.2 for x in found.rounded.values())
    reader = open_reader(out)
    before = dense(made(name))
    for n, q in reader.modules():
        w = before[f"{n}.weight"]
        assert float((q.dense() - w).norm() / w.norm()) == pytest.approx(found.rounded[n], rel=1e-5)


def test_inputs_that_have_no_place_are_said(made, tmp_path):
    assert convert(made("w8a8"), tmp_path / "a", "fewbits").notes == []
    assert any("inputs" in n for n in convert(made("llm.int8"), tmp_path / "b", "compressed-tensors").notes)


def test_the_command(capsys, made, source, tmp_path):
    argv = ["convert", str(made("awq")), str(tmp_path / "out")]
    assert main([*argv, "--format", "gptq", "--json", "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert dry["exact"] and dry["dry_run"] and not (tmp_path / "out").exists()
    assert main([*argv, "--format", "gptq", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["exact"] and found["format"] == "gptq" and sum(found["grids"].values()) == 14
    assert main([*argv, "--format", "gptq"]) == 2 and "exists" in capsys.readouterr().err
    assert main(["convert", str(made("awq")), str(tmp_path / "x"), "--format", "awq"]) == 2
    assert main(["convert", str(source), str(tmp_path / "x"), "--format", "awq"]) == 2
    assert "is not quantized" in capsys.readouterr().err
    assert main(["convert", str(made("nf4")), str(tmp_path / "x"), "--format", "gptq"]) == 2
    assert main(["convert", str(made("nf4")), str(tmp_path / "x"), "--format", "gptq", "--lossy"]) == 0
    assert main(["convert", str(made("awq")), str(tmp_path / "y.gguf")]) == 0
    assert gguf_import.config_of(gguf.read(tmp_path / "y.gguf"))["model_type"] == "llama"
