"""Damage of every kind, planted and found by the tensor's name; healthy checkpoints of every layout: no complaint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits import api
from fewbits.advise import doctor, loaders
from fewbits.cli import main
from fewbits.formats import Entry, gguf
from fewbits.grids import Int
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

Tensors = dict[str, torch.Tensor]
Q = "model.layers.1.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"

MADE: dict[str, dict[str, Any]] = {
    "gptq": {"method": "rtn", "format": "gptq", "bits": 4, "group_size": 32, "symmetric": True},
    "gptq-affine": {"method": "rtn", "format": "gptq", "bits": 3, "group_size": 32},
    "awq": {"method": "rtn", "format": "awq", "bits": 4, "group_size": 32},
    "compressed-tensors": {"method": "rtn", "bits": 4, "group_size": 32},
    "fp8": {"method": "fp8"},
    "nvfp4": {"method": "nvfp4"},
    "mxfp4": {"method": "mxfp4"},
    "w8a8": {"method": "w8a8"},
    "fewbits": {"method": "rtn", "format": "fewbits", "bits": 5, "group_size": 32},
    "nf4": {"method": "nf4"},
    "nf4-dq": {"method": "nf4-dq"},
    "llm.int8": {"method": "llm.int8"},
    "gguf": {"method": "q4_0"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model("llama", tmp_path_factory.mktemp("llama"), vocab_size=300)
    tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("made")

    def get(name: str) -> Path:
        if name == "dense":
            return source
        path = folder / name.replace(".", "-")
        if not path.exists():
            api.quantize(source, path, **MADE[name])
        return path

    return get


@pytest.mark.parametrize("name", ["dense", *MADE])
def test_healthy_checkpoints_give_no_complaint(made, name):
    found = doctor.check(made(name))
    assert [str(f) for f in found.findings] == []
    assert found.loads["transformers"].loads, found.loads
    assert found.loads["llama.cpp"].loads == (name == "gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_healthy_models_of_every_family(tmp_path, family):
    path = tiny_model(family, tmp_path / "model", sharded=family in ("llama", "mixtral"))
    assert [str(f) for f in doctor.check(path).findings] == []


# ---- damage ----------------------------------------------------------------------------------------------------------


def edit(change: Callable[[Tensors, dict[str, Any]], object]) -> Callable[[Path], object]:
    """Damage that changes tensors or the config."""

    def plant(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        change(tensors, config)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))

    return plant


def put(name: str, at: Any, value: Any) -> Callable[[Path], object]:
    def change(t: Tensors, config: dict[str, Any]) -> None:
        t[name][at] = value

    return edit(change)


def drop(name: str) -> Callable[[Path], object]:
    return edit(lambda t, config: t.pop(name))


def say(**fields: Any) -> Callable[[Path], object]:
    """Another value in config.json."""
    return edit(lambda t, config: config.update(fields))


def describe(**fields: Any) -> Callable[[Path], object]:
    """Another value in quantization_config."""
    return edit(lambda t, config: config["quantization_config"].update(fields))


def replace(name: str, f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return edit(lambda t, config: t.update({name: f(t[name])}))


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def append(path: Path) -> None:
    with (path / "model.safetensors").open("ab") as f:
        f.write(bytes(64))


def shard(path: Path, listed: bool = True) -> tuple[Tensors, dict[str, str]]:
    """Two shards and their index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    table = {n: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(table.values()):
        save_file({n: tensors[n] for n in names if table[n] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return tensors, table


def add(path: Path, file: str, name: str, t: torch.Tensor) -> None:
    tensors = load_file(path / file)
    save_file(tensors | {name: t}, path / file, {"format": "pt"})


def lose_shard(path: Path) -> None:
    _, table = shard(path)
    (path / table[NORM]).unlink()


def twice(path: Path) -> None:
    tensors, table = shard(path)
    other = next(f for f in table.values() if f != table[NORM])
    add(path, other, NORM, tensors[NORM])


def unlisted(path: Path) -> None:
    _, table = shard(path)
    add(path, table[NORM], "model.extra", torch.ones(3))


def misplaced(path: Path) -> None:
    _, table = shard(path)
    table[NORM] = next(f for f in table.values() if f != table[NORM])
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def stray_file(path: Path) -> None:
    shard(path)
    save_file({"model.old": torch.ones(3)}, path / "model-00003-of-00002.safetensors")


def untie(t: Tensors, config: dict[str, Any]) -> None:
    t["lm_head.weight"] = t[EMBEDDING] + 1


def densify(t: Tensors, config: dict[str, Any]) -> None:
    for suffix in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"):
        del t[f"{UP}.{suffix}"]
    t[f"{UP}.weight"] = torch.randn(96, 64).half()


def gguf_bytes(change: Callable[[bytearray, gguf.File], None]) -> Callable[[Path], object]:
    def plant(path: Path) -> None:
        file = path / "model.gguf"
        opened, data = gguf.read(file), bytearray(file.read_bytes())
        change(data, opened)
        file.write_bytes(data)

    return plant


def gguf_nan(data: bytearray, file: gguf.File) -> None:
    start = file.infos["blk.1.ffn_up.weight"].start
    data[start : start + 2] = b"\x00\x7e"  # half-precision NaN: the scale of the first block


def gguf_rename(data: bytearray, file: gguf.File) -> None:
    name = b"blk.1.ffn_up.weight"
    at = data.index(name)
    data[at : at + len(name)] = b"blk.1.ffn_xp.weight"


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    # name: (checkpoint, how, kind, tensor)
    "a truncated file": ("gptq", cut, "file", ""),
    "bytes outside the header": ("gptq", append, "file", "model.safetensors"),
    "a missing shard": ("gptq", lose_shard, "missing shard", ""),
    "a tensor in two shards": ("gptq", twice, "duplicate tensor", NORM),
    "a tensor that the index does not list": ("gptq", unlisted, "unlisted tensor", "model.extra"),
    "a tensor in another shard than the index says": ("gptq", misplaced, "missing tensor", NORM),
    "a shard that the index does not list": ("gptq", stray_file, "unlisted file", "model-00003-of-00002.safetensors"),
    "a missing part of a module": ("gptq", drop(f"{Q}.qzeros"), "missing tensor", f"{Q}.qzeros"),
    "a missing norm": ("awq", drop(NORM), "missing tensor", NORM),
    "an unexpected tensor": (
        "awq",
        edit(lambda t, c: t.update({"model.layers.9.x.weight": torch.ones(2, 2)})),
        "unexpected tensor",
        "model.layers.9.x.weight",
    ),
    "a NaN scale": ("gptq", put(f"{Q}.scales", (0, 3), float("nan")), "not finite", f"{Q}.scales"),
    "an infinite absmax": ("nf4", put(f"{Q}.weight.absmax", 2, float("inf")), "not finite", f"{Q}.weight.absmax"),
    "a zero scale": ("compressed-tensors", put(f"{Q}.weight_scale", (0, 1), 0.0), "zero scale", f"{Q}.weight_scale"),
    "NaN in a dense tensor": ("dense", put(NORM, 4, float("nan")), "not finite", NORM),
    "a blank embedding": ("fewbits", replace(EMBEDDING, torch.zeros_like), "blank tensor", EMBEDDING),
    "blank codes": ("gptq", replace(f"{Q}.qweight", torch.zeros_like), "blank codes", Q),
    "g_idx out of range": ("gptq", put(f"{Q}.g_idx", 5, 99), "wrong g_idx", f"{Q}.g_idx"),
    "g_idx with groups of unequal size": (
        "gptq",
        edit(lambda t, c: (t[f"{Q}.g_idx"].zero_(), c["quantization_config"].update(desc_act=True))),
        "wrong g_idx",
        f"{Q}.g_idx",
    ),
    "scattered groups without desc_act": (
        "gptq",
        replace(f"{Q}.g_idx", lambda t: t.flip(0)),
        "config mismatch",
        f"{Q}.g_idx",
    ),
    "codes cut off": ("gptq", replace(f"{Q}.qweight", lambda t: t[:-1]), "wrong shape", f"{Q}.g_idx"),
    "scales of another dtype": ("awq", replace(f"{Q}.scales", lambda t: t.int()), "wrong dtype", f"{Q}.scales"),
    "other bits in the config": ("gptq", describe(bits=8), "wrong shape", f"{Q}.scales"),
    "another group size in the config": ("awq", describe(group_size=64), "wrong shape", f"{Q}.qzeros"),
    "symmetric in the config only": ("gptq-affine", describe(sym=True), "config mismatch", f"{Q}.qzeros"),
    "a packed module that should be dense": (
        "compressed-tensors",
        describe(ignore=[Q, "lm_head"]),
        "config mismatch",
        Q,
    ),
    "a dense module that should be packed": ("compressed-tensors", edit(densify), "config mismatch", f"{UP}.weight"),
    "a listed module that is not there": (
        "fewbits",
        edit(lambda t, c: [t.pop(n) for n in list(t) if n.startswith(UP)]),
        "missing tensor",
        UP,
    ),
    "a broken tie": ("dense", edit(untie), "broken tie", "lm_head.weight"),
    "fewer layers in the config": (
        "dense",
        say(num_hidden_layers=1),
        "unexpected tensor",
        "model.layers.1.input_layernorm.weight",
    ),
    "more layers in the config": (
        "fewbits",
        say(num_hidden_layers=3),
        "missing tensor",
        "model.layers.2.input_layernorm.weight",
    ),
    "another width in the config": ("awq", say(intermediate_size=128), "wrong shape", UP),
    "an embedding smaller than the vocabulary": (
        "dense",
        edit(lambda t, c: (t.update({EMBEDDING: t[EMBEDDING][:200]}), c.update(vocab_size=200))),
        "vocabulary",
        EMBEDDING,
    ),
    "a state that is no JSON": (
        "nf4",
        put(f"{Q}.weight.quant_state.bitsandbytes__nf4", 0, 0),
        "unreadable module",
        f"{Q}.weight.quant_state.bitsandbytes__nf4",
    ),
    "a GGUF file cut off": (
        "gguf",
        lambda p: (p / "model.gguf").write_bytes((p / "model.gguf").read_bytes()[:-4096]),
        "file",
        "",
    ),
    "a NaN scale in GGUF": ("gguf", gguf_bytes(gguf_nan), "not finite", "blk.1.ffn_up.weight"),
    "a tensor of another name in GGUF": ("gguf", gguf_bytes(gguf_rename), "file", "blk.1.ffn_xp.weight"),
    "a method that nobody knows": ("awq", describe(quant_method="none such"), "config mismatch", "quantization_config"),
    "a config that is no JSON": ("dense", lambda p: (p / "config.json").write_text("{"), "config", "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_planted_damage_is_found(made, tmp_path, damage):
    name, plant, kind, tensor = DAMAGE[damage]
    path = tmp_path / "model"
    shutil.copytree(made(name), path)
    plant(path)
    found = doctor.check(path)
    kinds = [(f.kind, f.tensor) for f in found.findings]
    assert any(k == kind and (t == tensor or (not tensor and t)) for k, t in kinds), kinds
    assert not found.healthy and not found.loads["transformers"].loads
    if tensor == "" and "GGUF" not in damage:
        assert kinds[0][1].startswith(("model.", "lm_head"))  # by name, not only the file's


def test_damage_of_one_module_does_not_hide_another(made, tmp_path):
    shutil.copytree(made("gptq"), tmp_path / "model")
    put(f"{Q}.scales", (0, 0), float("nan"))(tmp_path / "model")
    drop(f"{UP}.g_idx")(tmp_path / "model")  # natural order: readers do without it
    drop(NORM)(tmp_path / "model")
    found = {f.tensor for f in doctor.check(tmp_path / "model").findings}
    assert found == {f"{Q}.scales", NORM}


def test_a_second_copy_of_a_tied_head_is_a_note(made, tmp_path):
    shutil.copytree(made("dense"), tmp_path / "model")
    edit(lambda t, c: t.update({"lm_head.weight": t[EMBEDDING].clone()}))(tmp_path / "model")
    found = doctor.check(tmp_path / "model")
    assert found.healthy and "second time" in found.notes[0]


# ---- who will load it ------------------------------------------------------------------------------------------------


def entries(grid: Int, other: Int | None = None) -> list[Entry]:
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    return [Entry(n, (128, 256), other if other and n.endswith("q_proj") else grid) for n in names]


@pytest.mark.parametrize(
    ("format", "grid", "other", "loader", "words"),
    [
        ("compressed-tensors", Int(4, 32, symmetric=True), Int(8, 32, symmetric=True), "vllm", "as one matrix"),
        ("gptq", Int(3, 128, symmetric=True), None, "vllm", "3 bits; it runs 4 and 8"),
        ("gptq", Int(4, 16, symmetric=True), None, "vllm", "groups of 16"),
        ("gptq", Int(4, 128), None, "vllm", "affine GPTQ"),
        ("fewbits", Int(4, 128), None, "vllm", "does not know the format"),
        ("compressed-tensors", Int(4, 32), Int(8, 32), "transformers", "several grids"),
        ("gptq", Int(4, 128, symmetric=True), None, "llama.cpp", "convert to gguf"),
    ],
)
def test_rules_of_loaders(format, grid, other, loader, words):
    verdict = loaders.verdicts(format, entries(grid, other), 0)[loader]
    assert not verdict.loads and any(words in r for r in verdict.reasons), verdict


def test_a_usual_checkpoint_loads_in_vllm():
    for format in ("gptq", "compressed-tensors"):
        found = loaders.verdicts(format, entries(Int(4, 128, symmetric=True)), 0)
        assert found["vllm"].loads and found["transformers"].loads and not found["llama.cpp"].loads
    assert not loaders.verdicts("gptq", [], 2)["vllm"].loads


def test_the_command(capsys, made, tmp_path):
    assert main(["inspect", str(made("gptq")), "--check", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["checked"] and found["healthy"] and found["loads"]["transformers"]["loads"]
    assert "vllm: loads" in err
    shutil.copytree(made("gptq"), tmp_path / "model")
    put(f"{Q}.scales", (0, 0), float("nan"))(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), "--check", "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert not found["healthy"] and found["findings"][0]["tensor"] == f"{Q}.scales"
    assert f"{Q}.scales" in err.splitlines()[-1]
