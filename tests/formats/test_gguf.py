"""The GGUF container against gguf-py, whole models there and back, and files that lie."""

from __future__ import annotations

import re
import struct
import sys
import time
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits.errors import CheckpointError, FewbitsError, RequestError
from fewbits.formats import gguf, gguf_blocks, gguf_imatrix, gguf_import, gguf_model, gguf_names, gguf_rope
from fewbits.grids import BLOCK_TYPES, Block
from fewbits.model import rows
from fewbits.storage import Checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe")
CHANGES = {"gemma3_text": {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16}}
CHANGES["qwen3_moe"] = {"mlp_only_layers": []}
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "big": 2**40,
    "signed": -3,
    "real": 0.5,
    "flag": True,
    "names": ["a", "ä b", ""],
    "numbers": [1, -2, 3],
    "reals": [0.5, -1.0],
}


@pytest.fixture
def small(tmp_path) -> Path:
    """A file with every kind of value and a few tensors."""
    grid = Block("q4_k")
    tensors = {
        "a.weight": torch.randn(4, 3),
        "b.weight": gguf_blocks.pack(grid, *grid.search(torch.randn(2, 512))),
        "c": torch.arange(5).half(),
    }
    infos = [gguf.Info("a.weight", "f32", (4, 3)), gguf.Info("b.weight", "q4_k", (2, 512)), gguf.Info("c", "f16", (5,))]
    path = tmp_path / "small.gguf"
    gguf.write(path, METADATA, infos, lambda i: [tensors[i.name].contiguous().view(torch.uint8).numpy().tobytes()])
    return path


def test_gguf_py_reads_what_we_write(small):
    theirs, ours = reference.GGUFReader(small), gguf.read(small)
    for key, value in METADATA.items():
        assert theirs.fields[key].contents() == value == ours.metadata[key]
    assert [t.name for t in theirs.tensors] == list(ours.infos)
    for t in theirs.tensors:
        own = ours.tensor(t.name)
        assert list(own.shape) == t.shape.tolist()[::-1]
        np.testing.assert_array_equal(
            own.numpy(), reference.quants.dequantize(t.data, t.tensor_type).reshape(own.shape)
        )


def test_we_read_what_gguf_py_writes(tmp_path):
    path = tmp_path / "theirs.gguf"
    w = reference.GGUFWriter(path, "llama")
    w.add_block_count(3)
    w.add_array("list", ["x", "y"])
    w.add_custom_alignment(64)
    x = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    w.add_tensor("x", x)
    w.add_tensor(
        "q",
        reference.quants.quantize(x, reference.GGMLQuantizationType.Q8_0),
        raw_dtype=reference.GGMLQuantizationType.Q8_0,
    )
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    file = gguf.read(path)
    assert file.metadata["llama.block_count"] == 3 and file.metadata["list"] == ["x", "y"]
    np.testing.assert_array_equal(file.tensor("x").numpy(), x)
    assert file.infos["q"].kind == "q8_0" and file.infos["q"].start % 64 == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_survives_the_way_there_and_back(family, tmp_path):
    source = tiny_model(family, tmp_path / "model", vocab_size=300, **CHANGES.get(family, {}))
    tokenizer = tiny_tokenizer(source)
    path = tmp_path / "m.gguf"
    gguf_model.prepare(source, [Checkpoint.open(source)], "f32").write(path)
    back = gguf_import.convert(path, tmp_path / "back", torch.float32)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want, got = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(ids).logits for p in (source, back))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    text = "the lazy dog, 12 foxes\n  jump"
    assert AutoTokenizer.from_pretrained(back)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_names_are_those_of_gguf_py(tmp_path):
    """Every tensor of every family, against gguf-py's own map of names."""
    for family in FAMILIES:
        f = gguf_names.family(family)
        arch = next(k for k, v in reference.MODEL_ARCH_NAMES.items() if v == f.name)
        names = reference.get_tensor_name_map(arch, 2)
        for name in Checkpoint.open(tiny_model(family, tmp_path / family, **CHANGES.get(family, {}))).names():
            together = re.sub(r"\.experts\.\d+\.", ".experts.", name)
            assert gguf_names.stored_name(name, f) == names.get_name(together, (".weight", ".bias")), name


def test_rotary_rows_become_neighbours():
    assert gguf_model.neighbours(8, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_llama3_factors_are_those_of_transformers(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 5e5 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(
        gguf_rope.llama3(gguf_rope.parameters(config.to_dict()), 128), plain / scaled, rtol=1e-5, atol=0
    )


def test_split_files_hold_every_tensor_once(tmp_path):
    source = tiny_model("llama", tmp_path / "model", vocab_size=300)
    tiny_tokenizer(source)
    export = gguf_model.prepare(source, [Checkpoint.open(source)], "f16")
    paths = export.write(tmp_path / "m.gguf", 60_000)
    assert len(paths) > 1 and paths[0].name == f"m-00001-of-{len(paths):05}.gguf"
    names = [t.name for p in paths for t in reference.GGUFReader(p).tensors]
    assert sorted(names) == sorted(i.info.name for i in export.items)
    assert all(gguf.read(p).metadata["split.count"] == len(paths) for p in paths)


@pytest.mark.parametrize("suffix", ["dat", "gguf"])
def test_importance_matrices_come_back(suffix, tmp_path):
    sums = {"blk.0.attn_q.weight": torch.rand(16) * 100, "blk.0.ffn_down.weight": torch.rand(8)}
    made = gguf_imatrix.Imatrix(sums, {"blk.0.attn_q.weight": 50.0, "blk.0.ffn_down.weight": 4.0}, "text", 3)
    made.write(tmp_path / f"i.{suffix}")
    again = gguf_imatrix.read(tmp_path / f"i.{suffix}")
    assert again.dataset == "text" and again.chunks == 3
    for name, mean in made.mean_squares().items():
        torch.testing.assert_close(again.mean_squares()[name], mean)


@pytest.mark.parametrize("suffix", ["dat", "gguf"])
def test_an_importance_matrix_of_a_model_is_the_mean_square_of_its_inputs(suffix, tmp_path):
    from transformers import AutoModelForCausalLM

    from fewbits.cli import main

    source = tiny_model("llama", tmp_path / "model", vocab_size=300)
    tokenizer = tiny_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and sleeps all day long " * 40)
    out = tmp_path / f"i.{suffix}"
    how = ["--format", "imatrix", "--calibration", str(text), "--samples", "3", "--seq-len", "16"]
    assert main(["convert", str(source), str(out), *how]) == 0
    found = gguf_imatrix.read(out).mean_squares()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            stored = gguf_names.stored_name(f"{name}.weight", gguf_names.family("llama"))
            module.register_forward_pre_hook(lambda m, x, n=stored: seen.update({n: x[0].square().mean((0, 1))}))
    with torch.no_grad():
        model(rows(tokenizer, str(text), 3, 16))
    assert found.keys() == seen.keys() and len(found) == 14
    for name, mean in seen.items():
        torch.testing.assert_close(found[name], mean, rtol=1e-4, atol=1e-7)
    assert main(["convert", str(out), str(tmp_path / "again.dat"), "--format", "imatrix"]) == 0
    again = gguf_imatrix.read(tmp_path / "again.dat").mean_squares()
    assert all(torch.allclose(again[n], found[n], rtol=1e-5) for n in found)


# ---- files that lie --------------------------------------------------------------------------------------------------


def header(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def entry(name: bytes, sizes: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return head + struct.pack("<IQ", kind, offset)


KEY = struct.pack("<Q", 1) + b"k"
LIES = {
    "empty": b"",
    "no magic": b"GGML" + bytes(60),
    "version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0) + bytes(40),
    "tensors": header(2**62, 0),
    "keys": header(0, 2**62),
    "long string": header(0, 1, KEY + struct.pack("<IQ", 8, 2**60)),
    "long array": header(0, 1, KEY + struct.pack("<IIQ", 9, 4, 2**61)),
    "many strings": header(0, 1, KEY + struct.pack("<IIQ", 9, 8, 2**40)),
    "deep array": header(0, 1, KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50),
    "key type": header(0, 1, KEY + struct.pack("<I", 77) + bytes(30)),
    "same key": header(0, 2, (KEY + struct.pack("<IB", 0, 1)) * 2),
    "alignment": header(0, 1, struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 3)),
    "dimensions": header(1, 0, entry(b"t", (1,) * 9, 0, 0) + bytes(64)),
    "no rows": header(1, 0, entry(b"t", (0, 4), 0, 0) + bytes(64)),
    "overflow": header(1, 0, entry(b"t", (2**40, 2**40), 0, 0) + bytes(64)),
    "type": header(1, 0, entry(b"t", (4,), 999, 0) + bytes(64)),
    "half a block": header(1, 0, entry(b"t", (100,), 12, 0) + bytes(64)),
    "past the end": header(1, 0, entry(b"t", (4,), 0, 2**40) + bytes(64)),
    "crooked": header(1, 0, entry(b"t", (4,), 0, 7) + bytes(64)),
    "overlap": header(2, 0, entry(b"t", (16,), 0, 0) + entry(b"u", (16,), 0, 32) + bytes(256)),
    "same name": header(2, 0, entry(b"t", (8,), 0, 0) + entry(b"t", (8,), 0, 32) + bytes(256)),
    "long name": header(1, 0, entry(b"n" * 5000, (4,), 0, 0) + bytes(64)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_in_one_line_and_at_once(lie, tmp_path):
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[lie])
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as e:
        gguf.read(path)
    assert time.perf_counter() - started < 1 and "\n" not in str(e.value) and len(str(e.value)) < 500 + len(str(path))


LARGE = {
    "llama.block_count": [2**24, 1, 3],
    "llama.feed_forward_length": [2**30, 95],
    "llama.attention.head_count": [2**20, 8],
    "llama.attention.head_count_kv": [4],
    "llama.attention.key_length": [2**20],
    "llama.embedding_length": [2**30, 128],
    "llama.expert_count": [4],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in LARGE.items() for v in values])
def test_a_model_is_as_large_as_its_tensors_whatever_the_metadata_says(key, value, tmp_path):
    source = tiny_model("llama", tmp_path / "model", vocab_size=300)
    tiny_tokenizer(source)
    gguf_model.prepare(source, [Checkpoint.open(source)], "f16").write(tmp_path / "m.gguf")
    sound = gguf.read(tmp_path / "m.gguf")
    path = tmp_path / "lie.gguf"
    lie = sound.metadata | {key: value, "llama.expert_used_count": 1}
    gguf.write(path, lie, list(sound.infos.values()), lambda i: [sound.raw(i.name).numpy().tobytes()])
    with pytest.raises(CheckpointError, match=r"the metadata says|the embedding is not|differ in"):
        gguf_import.config_of(gguf.read(path))


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_load_or_fail_in_one_line(small, data):
    raw = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1))
        change = data.draw(st.sampled_from(["byte", "word", "cut", "grow"]))
        if change == "byte":
            raw[at] = data.draw(st.integers(0, 255))
        elif change == "word":
            raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])))
        elif change == "cut" and len(raw) > 40:
            del raw[at : at + 20]
        else:
            raw[at:at] = bytes(data.draw(st.integers(1, 40)))
    path = small.with_name("mutated.gguf")
    path.write_bytes(bytes(raw))
    try:
        file = gguf.read(path)
        for name in file.infos:
            file.tensor(name)
        gguf_import.config_of(file)
    except FewbitsError as e:
        assert "\n" not in str(e).replace(str(path), "")


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(RequestError, match="model type 'opt' cannot be written as GGUF; allowed: llama"):
        gguf_names.family("opt")
    with pytest.raises(RequestError, match="has no place in a GGUF file"):
        gguf_names.stored_name("model.layers.0.mlp.experts.1.w1.weight", gguf_names.family("llama"))
    with pytest.raises(RequestError, match="no such file"):
        gguf.read(tmp_path / "none.gguf")


def test_every_type_has_its_number():
    for kind, number in gguf.NUMBER.items():
        t = reference.GGMLQuantizationType(number)
        assert t.name.lower() == kind and reference.GGML_QUANT_SIZES[t] == gguf.KINDS[number][1:]
    assert set(BLOCK_TYPES) < set(gguf.NUMBER)
