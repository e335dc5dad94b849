"""Laws of every layout: what was packed comes back, every format stands for the same numbers, bits are counted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fewbits import formats
from fewbits.errors import CheckpointError, Refused, RequestError
from fewbits.formats import Entry, bitpack, common
from fewbits.formats.awq import AWQ
from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.formats.fewbits import Fewbits
from fewbits.formats.gptq import GPTQ
from fewbits.grids import Int, groups_of
from fewbits.tensor import Quantized

NAME = "model.layers.0.mlp.up_proj"


def quantized(grid: Int, shape: tuple[int, int] = (64, 128), scattered: bool = False, seed: int = 0) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    rows = 1 if grid.rows == -1 else shape[0] // grid.rows
    shared = (rows, groups_of(shape[1], grid.group))
    params = {"scale": (torch.rand(shared, generator=g) + 0.1).to(grid.dtype)}
    if not grid.symmetric:
        params["zero"] = torch.randint(0, grid.qmax + 1, shared, generator=g).to(torch.uint8)
        params["zero"][0, 0] = 0  # what version 1 of GPTQ cannot hold
    if scattered:
        order = torch.randperm(shape[1], generator=g)
        params["g_idx"] = grid.index({"scale": params["scale"]}, shape[1]).int()[order]
    codes = torch.randint(0, grid.qmax + 1, shape, generator=g).to(torch.uint8)
    return Quantized(grid, codes, params)


def entry(q: Quantized, name: str = NAME) -> Entry:
    return Entry(name, q.shape, q.grid, "g_idx" in q.params)


def suffixed(tensors: dict[str, torch.Tensor], name: str = NAME) -> dict[str, torch.Tensor]:
    assert all(t.startswith(name + ".") and v.is_contiguous() for t, v in tensors.items())
    return {t.removeprefix(name + "."): v for t, v in tensors.items()}


def through(layout_name: str, q: Quantized) -> tuple[dict[str, torch.Tensor], Quantized]:
    """Tensors by suffix, and what an independent reading of configuration and tensors gives."""
    layout = formats.writer(layout_name, [entry(q)])
    tensors = suffixed(layout.pack(NAME, q))
    config = json.loads(json.dumps(layout.config([entry(q)])))
    assert set(tensors) <= layout.suffixes
    return tensors, formats.detect(config).unpack(NAME, tensors)


def assert_same(a: Quantized, b: Quantized) -> None:
    assert a.grid == b.grid
    assert torch.equal(a.codes, b.codes) and a.codes.dtype == b.codes.dtype
    assert a.params.keys() == b.params.keys()
    for key in a.params:
        assert torch.equal(a.params[key], b.params[key]) and a.params[key].dtype == b.params[key].dtype
    assert torch.equal(a.dense(), b.dense())


def grids(bits: tuple[int, ...], groups: tuple[int, ...] = (32, -1)) -> list[Int]:
    return [Int(b, g, symmetric=s) for b in bits for g in groups for s in (True, False)]


CASES = [("gptq", q) for q in grids((2, 3, 4, 8))]
CASES += [("awq", q) for q in grids((4,))]
CASES += [("compressed-tensors", q) for q in grids((2, 3, 4, 8))]
CASES += [("compressed-tensors", Int(b, -1, -1, s)) for b in (4, 8) for s in (True, False)]
CASES += [("compressed-tensors", Int(4, 32, 1, s, dtype)) for s in (True, False) for dtype in ("bfloat16", "float32")]
CASES += [("fewbits", q) for q in grids((2, 3, 4, 5, 6, 7, 8))]
CASES += [("fewbits", Int(3, 32, 16, False, "bfloat16")), ("fewbits", Int(5, -1, -1, True, "float32"))]


@pytest.mark.parametrize("name, grid", CASES, ids=str)
def test_what_was_packed_comes_back(name: str, grid: Int) -> None:
    q = quantized(grid)
    assert_same(through(name, q)[1], q)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["gptq", "fewbits"])
def test_a_short_last_group_and_scattered_groups(name: str, bits: int) -> None:
    for scattered in (False, True):
        q = quantized(Int(bits, 128), (64, 576), scattered)  # 4.5 groups
        tensors, back = through(name, q)
        assert_same(back, q)
        assert ("scales" if name == "gptq" else "scale") in tensors


def test_rows_and_columns_that_fill_no_word_in_fewbits() -> None:
    for bits in range(2, 9):
        assert_same(*(q := quantized(Int(bits, 10), (7, 33)), through("fewbits", q)[1]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_formats_stand_for_the_same_numbers(symmetric: bool) -> None:
    q = quantized(Int(4, 32, symmetric=symmetric))
    for name in UNIFORM:
        assert torch.equal(through(name, q)[1].dense(), q.dense())
    if symmetric:  # both versions of GPTQ
        for version in (1, 2):
            layout = GPTQ(Int(4, 32, symmetric=True), version)
            assert torch.equal(layout.unpack(NAME, suffixed(layout.pack(NAME, q))).dense(), q.dense())


UNIFORM = [name for name in formats.LAYOUTS if name not in ("gguf", "bitsandbytes")]  # the layouts of integer grids
SHAPES = {
    "gptq": {"qweight": ([16, 64], torch.int32), "qzeros": ([4, 8], torch.int32), "scales": ([4, 64], torch.float16)},
    "awq": {"qweight": ([128, 8], torch.int32), "qzeros": ([4, 8], torch.int32), "scales": ([4, 64], torch.float16)},
    "compressed-tensors": {
        "weight_packed": ([64, 16], torch.int32),
        "weight_scale": ([64, 4], torch.float16),
        "weight_zero_point": ([8, 4], torch.int32),
        "weight_shape": ([2], torch.int64),
    },
    "fewbits": {"codes": ([64, 16], torch.int32), "scale": ([64, 4], torch.float16), "zero": ([32], torch.int32)},
}
SHAPES["gptq"]["g_idx"] = ([128], torch.int32)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_dtypes(name: str) -> None:
    tensors, _ = through(name, quantized(Int(4, 32)))
    assert {k: (list(v.shape), v.dtype) for k, v in tensors.items()} == SHAPES[name]


@pytest.mark.parametrize("grid", [Int(b, g) for b in (2, 3, 4, 8) for g in (32, -1)], ids=str)
@pytest.mark.parametrize("name", list(SHAPES))
def test_bits_counted_are_bits_written(name: str, grid: Int) -> None:
    q = quantized(grid)
    if formats.get(name).check([entry(q)]):
        pytest.skip("the format does not hold it")
    tensors, _ = through(name, q)
    free = {"g_idx", "weight_shape"}  # neither is a parameter of the grid; g_idx of consecutive groups carries nothing
    written = sum(8 * t.numel() * t.element_size() for key, t in tensors.items() if key not in free)
    assert written == grid.cost(q.shape) * q.codes.numel()


def test_symmetric_gptq_and_awq_write_zeros_that_the_grid_does_not_count() -> None:
    q = quantized(Int(4, 32, symmetric=True))
    for name in ("gptq", "awq"):
        tensors, _ = through(name, q)
        assert 8 * 4 * tensors["qzeros"].numel() == 4 * q.params["scale"].numel()


def test_padding_is_less_than_a_word_a_row() -> None:
    q = quantized(Int(5, 10), (7, 33))
    tensors, _ = through("fewbits", q)
    written = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    assert 0 <= written - q.grid.cost(q.shape) * q.codes.numel() < 32 * 8


@pytest.mark.parametrize("bits, word", [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_gptq_is_version_1(bits: int, word: int) -> None:
    q = quantized(Int(bits, 32, symmetric=True))
    layout = formats.writer("gptq", [entry(q)])
    assert layout.config([entry(q)])["checkpoint_format"] == "gptq"
    assert set((suffixed(layout.pack(NAME, q))["qzeros"] & 0xFFFFFFFF).flatten().tolist()) == {word}


def test_affine_gptq_is_version_2_and_version_1_refuses_zero_0() -> None:
    q = quantized(Int(4, 32))
    layout = formats.writer("gptq", [entry(q)])
    assert layout.config([entry(q)])["checkpoint_format"] == "gptq_v2" and layout.version == 2
    with pytest.raises(RequestError, match="zero point 0 cannot be stored in version 1"):
        GPTQ(q.grid, 1).pack(NAME, q)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_version_1_with_borrows_is_read_as_its_readers_do(bits: int) -> None:
    q = quantized(Int(bits, 32))
    tensors = suffixed(GPTQ(q.grid, 2).pack(NAME, q))
    tensors["qzeros"] = bitpack.shift_words(tensors["qzeros"], bits, -1)
    assert_same(GPTQ(q.grid, 1).unpack(NAME, tensors), q)


def test_version_1_of_three_bits() -> None:
    q = quantized(Int(3, 32))
    q.params["zero"].clamp_(min=1)
    assert_same(GPTQ(q.grid, 1).unpack(NAME, suffixed(GPTQ(q.grid, 1).pack(NAME, q))), q)


@pytest.mark.parametrize("declared", [1, 2])
def test_symmetric_zeros_tell_a_wrongly_declared_version(declared: int) -> None:
    q = quantized(Int(4, 32, symmetric=True))
    tensors = suffixed(GPTQ(q.grid, 3 - declared).pack(NAME, q))
    assert_same(GPTQ(q.grid, declared).unpack(NAME, tensors), q)


def test_awq_without_zero_point_still_writes_zeros_of_8() -> None:
    tensors, back = through("awq", quantized(Int(4, 32, symmetric=True)))
    assert set(tensors["qzeros"].flatten().tolist()) == {-2004318072} and back.grid.symmetric


def test_the_search_for_parameters_is_not_stored() -> None:
    grid = Int(4, 32, ratios=((1.0, 1.0), (0.9, 0.9)), norm=2.4)
    for name in UNIFORM:
        assert through(name, quantized(grid))[1].grid == common.stored(grid) != grid


REFUSALS = [
    ("gptq", Int(5, 32), (64, 128), "5 bits have no place in it; allowed: 2, 3, 4, 8"),
    ("gptq", Int(4, 32, scale="bfloat16"), (64, 128), "float16 scales only, not bfloat16"),
    ("gptq", Int(4, 32, rows=4), (64, 128), "shared by several rows"),
    ("gptq", Int(4, 32), (64, 100), "multiples of 8"),
    ("gptq", Int(3, 32), (48, 128), "multiples of 32"),
    ("awq", Int(3, 32), (64, 128), "3 bits have no place in it; allowed: 4"),
    ("awq", Int(4, 128), (64, 576), "columns in multiples of the group size 128; give --group-size 64"),
    ("awq", Int(4, 32), (60, 128), "rows must be a multiple of 8"),
    ("awq", Int(4, 32, scale="float32"), (64, 128), "float16 scales only"),
    ("compressed-tensors", Int(5, 32), (64, 128), "5 bits are not written in it"),
    ("compressed-tensors", Int(4, 128), (64, 576), "multiples of the group size 128"),
    ("compressed-tensors", Int(4, 32, rows=4), (64, 128), "tiles of several rows"),
    ("fewbits", Int(4, 32, rows=5), (64, 128), "rows must be a multiple of the 5"),
]


@pytest.mark.parametrize("name, grid, shape, reason", REFUSALS, ids=str)
def test_what_cannot_be_stored_is_refused_before_any_work(
    name: str, grid: Int, shape: tuple[int, int], reason: str
) -> None:
    entries = [
        Entry(NAME, shape, grid),
        Entry("model.layers.1.mlp.up_proj", shape, grid),
        Entry("lm_head", (8, 8), None),
    ]
    with pytest.raises(Refused) as e:
        formats.writer(name, entries)
    assert reason in str(e.value) and NAME in str(e.value) and "lm_head" not in str(e.value)
    assert e.value.exit_code == 2 and "\n" not in str(e.value)
    if shape[0] % max(grid.rows, 1) == 0:
        with pytest.raises(RequestError):
            formats.get(name).pack(NAME, quantized(grid, shape))


@pytest.mark.parametrize("name", list(SHAPES))
def test_scattered_groups_residuals_and_other_grids(name: str) -> None:
    class Other:
        width, period = 1, -1

    layout = formats.get(name)
    refused = layout.check([Entry("a", (64, 64), Int(4, 32), scattered=True)])
    assert bool(refused) == (name in ("awq", "compressed-tensors"))
    assert "low rank" in layout.check([Entry("a", (64, 64), Int(4, 32), residual="low rank")])[0].reason
    assert "Other" in layout.check([Entry("a", (64, 64), Other())])[0].reason
    assert layout.check([Entry("a", (63, 61), None)]) == []


def test_mixed_grids_by_module() -> None:
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]
    picked = dict.fromkeys(names, Int(4, 32)) | {names[1]: Int(8, 64, symmetric=True), names[4]: Int(3, -1)}
    entries = [Entry(n, (64, 128), g) for n, g in picked.items()] + [Entry("model.layers.2.mlp.gate", (4, 128), None)]
    for name in ("gptq", "compressed-tensors", "fewbits"):
        layout = formats.writer(name, entries)
        for module, grid in picked.items():
            q = quantized(grid)
            assert_same(layout.unpack(module, suffixed(layout.pack(module, q), module)), q)
    with pytest.raises(Refused, match="all modules must have the same"):
        formats.writer("awq", entries)


def test_gptq_configuration_names_what_differs_and_what_stays_dense() -> None:
    entries = [
        Entry(f"model.layers.{i}.mlp.{p}", (64, 128), Int(4, 32)) for i in (0, 1) for p in ("up_proj", "down_proj")
    ]
    entries[3] = dataclasses.replace(entries[3], grid=Int(8, 32))
    entries += [Entry("model.layers.0.mlp.gate", (64, 128), None), Entry("lm_head", (64, 128), None)]
    config = GPTQ().config(entries)
    assert config["dynamic"] == {
        r"+:^(?:model\.layers\.1\.mlp\.down_proj)$": {"bits": 8, "group_size": 32, "sym": False},
        r"-:^(?:model\.layers\.0\.mlp\.gate)$": {},
    }
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj", "mlp.down_proj"]]
    assert {k: config[k] for k in ("bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
        "lm_head": False,
    }
    assert json.loads(GPTQ().files(entries)["quantize_config.json"]) == config
    with pytest.raises(CheckpointError, match="excludes it"):
        GPTQ.read(config).unpack("model.layers.0.mlp.gate", {})


def test_a_short_last_group_asks_for_the_kernel_that_runs_it() -> None:
    assert GPTQ().config([Entry(NAME, (64, 576), Int(4, 128))])["backend"] == "torch"
    assert "backend" not in GPTQ().config([Entry(NAME, (64, 576), Int(4, 64))])


def test_compressed_tensors_configuration() -> None:
    q = Entry("model.layers.0.mlp.up_proj", (64, 128), Int(4, 32))
    other = Entry("model.layers.0.mlp.down_proj", (64, 128), Int(8, -1, symmetric=True))
    more = Entry("model.layers.1.mlp.up_proj", (64, 128), Int(4, 32))
    config = CompressedTensors().config([q, other, more, Entry("model.layers.0.mlp.gate", (8, 128), None)])
    assert config["ignore"] == ["model.layers.0.mlp.gate", "lm_head"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["model.layers.0.mlp.down_proj"], ["Linear"]]
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    theirs = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig.model_validate(config)
    assert theirs.config_groups["group_1"].weights.num_bits == 4


def test_unknown_formats_and_methods() -> None:
    with pytest.raises(
        RequestError,
        match="format 'zip' is unknown; allowed: compressed-tensors, gptq, awq, gguf, fewbits, bitsandbytes",
    ):
        formats.get("zip")
    for config in ({"quant_method": "quanto"}, {}, {"quant_method": 5}, None):
        with pytest.raises(RequestError, match="cannot be read; readable: "):
            formats.detect(config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quant_method": "gptq", "bits": "4"}, "bits = '4', which"),
        ({"quant_method": "gptq", "bits": 5}, "bits = 5"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {"bits": 8}}}, "not a regular expression"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": [1]}, "dynamic"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:a": 3}}, "nothing useful"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size = 0"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version = 'gemv'"),
        ({"quant_method": "awq", "w_bit": 8}, "w_bit = 8"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format = 'marlin-24"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "no config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"]}}}, "no weights"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {}, "targets": 3}}},
            "no list of targets",
        ),
        ({"quant_method": "fewbits", "fewbits_version": 2}, "fewbits_version 2; this release reads 1"),
        ({"quant_method": "fewbits", "fewbits_version": 1}, "no list of groups"),
        ({"quant_method": "fewbits", "fewbits_version": 1, "groups": [3]}, "without modules"),
        (
            {"quant_method": "fewbits", "fewbits_version": 1, "groups": [{"grid": {"type": "X"}, "modules": {}}]},
            "known: Int",
        ),
    ],
)
def test_configurations_that_cannot_be_read(config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        formats.detect(config)


@pytest.mark.parametrize(
    "grid", [{"bits": 9}, {"bits": "4"}, {"bits": True}, {"scale": "int8"}, {"depth": 3}, {"group": 0}]
)
def test_fewbits_grids_that_cannot_be(grid: dict) -> None:
    group = {"grid": {"type": "Int"} | grid, "modules": {NAME: [64, 128]}}
    with pytest.raises(CheckpointError, match="grid"):
        Fewbits.read({"fewbits_version": 1, "groups": [group]})


@pytest.mark.parametrize("shape", [[64], [0, 128], [64, -1], "64", [64, 2**40], [64.0, 128]])
def test_fewbits_shapes_that_cannot_be(shape) -> None:
    with pytest.raises(CheckpointError, match="which cannot be"):
        Fewbits.read({"fewbits_version": 1, "groups": [{"grid": {"type": "Int"}, "modules": {NAME: shape}}]})


HOSTILE = {
    "missing": lambda t, k: t.pop(k),
    "one row less": lambda t, k: t.__setitem__(k, t[k][:-1]),
    "one axis more": lambda t, k: t.__setitem__(k, t[k].unsqueeze(0)),
    "a scalar": lambda t, k: t.__setitem__(k, t[k].reshape(-1)[0]),
    "wrong dtype": lambda t, k: t.__setitem__(k, t[k].to(torch.float64)),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("name", list(SHAPES))
def test_damaged_tensors_are_found(name: str, what: str) -> None:
    q = quantized(Int(4, 32), scattered=name in ("gptq", "fewbits"))
    layout = formats.writer(name, [entry(q)])
    for key in suffixed(layout.pack(NAME, q)):
        tensors = suffixed(layout.pack(NAME, q))
        HOSTILE[what](tensors, key)
        if what == "missing" and key == "g_idx":
            continue  # older files have none
        with pytest.raises(CheckpointError, match="up_proj"):
            layout.unpack(NAME, tensors)


@pytest.mark.parametrize("name", ["gptq", "fewbits"])
@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
def test_g_idx_out_of_range(name: str, value: int) -> None:
    q = quantized(Int(4, 32), scattered=True)
    layout = formats.writer(name, [entry(q)])
    tensors = suffixed(layout.pack(NAME, q))
    tensors["g_idx"][3] = value
    with pytest.raises(CheckpointError, match="g_idx points outside its 4 groups"):
        layout.unpack(NAME, tensors)


@pytest.mark.parametrize("name", list(SHAPES))
def test_scales_that_are_not_finite(name: str) -> None:
    q = quantized(Int(4, 32))
    q.params["scale"][3, 1] = float("nan")
    layout = formats.writer(name, [entry(q)])
    with pytest.raises(CheckpointError, match="not finite"):
        layout.unpack(NAME, suffixed(layout.pack(NAME, q)))


def test_compressed_tensors_lies() -> None:
    q = quantized(Int(4, -1, -1))
    layout = formats.writer("compressed-tensors", [entry(q)])
    tensors = suffixed(layout.pack(NAME, q))
    with pytest.raises(CheckpointError, match="weight_zero_point lies outside 4 bits"):
        layout.unpack(NAME, tensors | {"weight_zero_point": torch.tensor([8], dtype=torch.int8)})
    for shape in ([64, -1], [0, 128], [2**40, 128], [64, 2**33]):
        with pytest.raises(CheckpointError, match=r"weight_shape|weight_packed"):
            layout.unpack(NAME, tensors | {"weight_shape": torch.tensor(shape)})


def test_compressed_tensors_of_earlier_releases() -> None:
    q = quantized(Int(3, 32, symmetric=True))
    layout = formats.writer("compressed-tensors", [entry(q)])
    padded = torch.nn.functional.pad(q.codes, (0, 2)).reshape(64, 13, 10)  # ten codes a word, two bits empty
    tensors = suffixed(layout.pack(NAME, q)) | {"weight_packed": bitpack.pack(padded, 3).squeeze(-1)}
    assert_same(layout.unpack(NAME, tensors), q)


def test_parameters_that_do_not_fit_are_never_packed() -> None:
    good = quantized(Int(4, 32))
    for key, value in (("scale", good.params["scale"][:, :2]), ("scale", good.params["scale"].float())):
        bad = dataclasses.replace(good, params=good.params | {key: value})
        for name in UNIFORM:
            with pytest.raises(RequestError):
                formats.get(name).pack(NAME, bad)


def test_warnings_for_engines_that_fuse() -> None:
    entries = [
        Entry(f"m.0.self_attn.{p}", (64, 64), Int(4, 32, symmetric=True)) for p in ("q_proj", "k_proj", "v_proj")
    ]
    assert formats.warnings("gptq", entries) == []
    entries[0] = dataclasses.replace(entries[0], grid=None)
    assert "q_proj, k_proj, v_proj of m.0.self_attn as one matrix" in formats.warnings("gptq", entries)[0]
    assert "vLLM runs 4 and 8 bits only" in formats.warnings("gptq", [Entry("a", (64, 64), Int(3, 32))])[0]


def test_awq_reads_autoawqs_own_keys() -> None:
    layout = AWQ.read({"w_bit": 4, "q_group_size": 32, "zero_point": False, "version": "GEMM"})
    assert layout.grid == Int(4, 32, symmetric=True)
