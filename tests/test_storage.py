"""Storage: bytes equal to the safetensors library's, and no file, however damaged, gets past the header check."""

from __future__ import annotations

import errno
import json
import resource
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits import storage
from fewbits.errors import CheckpointError, FewbitsError, RequestError
from fewbits.storage import Checkpoint, merge, save


def some_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 7, generator=g)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32]
    found = {f"layer.{str(k)[6:]}.weight": w.to(k) for k in kinds}
    return found | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "é": torch.ones(2), "t": w.t()}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def test_save_writes_the_librarys_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    save(tmp_path / "ours.safetensors", dict(reversed(tensors.items())))
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs.safetensors", {"format": "pt"}
    )
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert [f.name for f in tmp_path.iterdir() if "partial" in f.name] == []


def test_open_returns_what_was_saved(tmp_path: Path) -> None:
    tensors = some_tensors()
    save(tmp_path / "model.safetensors", tensors)
    c = Checkpoint.open(tmp_path)
    assert c.names() == sorted(tensors)
    assert c.size_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert c.files == (tmp_path / "model.safetensors",)
    for name, t in tensors.items():
        assert name in c and c.shape(name) == tuple(t.shape) and c.dtype(name) == t.dtype
        assert same(c.tensor(name), t)
    with pytest.raises(CheckpointError, match=r"no tensor 'absent'"):
        c.tensor("absent")


def test_tensors_are_views_and_survive_release_and_the_checkpoint(tmp_path: Path) -> None:
    w = torch.arange(4096, dtype=torch.float32)
    save(tmp_path / "model.safetensors", {"w": w})
    c = Checkpoint.open(tmp_path)
    a, b = c.tensor("w"), c.tensor("w")
    assert a.data_ptr() == b.data_ptr()
    c.release()
    del c
    assert torch.equal(a, w)


def test_release_gives_memory_back(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    save(tmp_path / "model.safetensors", {"w": torch.ones(16 << 20)})  # 64 MiB
    c = Checkpoint.open(tmp_path)
    before = resident()
    assert c.tensor("w").sum() == 16 << 20
    touched = resident()
    c.release()
    assert touched - before > 50 << 20
    assert resident() - before < 8 << 20


def test_a_file_whose_data_is_not_aligned(tmp_path: Path) -> None:
    w = torch.tensor([1.5, -2.5])
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for pad in range(4):
        (tmp_path / "model.safetensors").write_bytes(raw(header + b" " * pad, w.numpy().tobytes()))
        assert torch.equal(Checkpoint.open(tmp_path).tensor("w"), w)


LIES = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "header longer than the file": raw({}, length=1000),
    "header of 2**63 bytes": raw({}, length=2**63),
    "header of zero bytes": raw(b""),
    "header cut": raw({"w": entry()}, b"\0" * 8)[:30],
    "not JSON": raw(b"{nonsense}"),
    "not UTF-8": raw(b'{"\xff\xfe": 1}'),
    "JSON nested too deep": raw(b"[" * 100_000),
    "a list": raw([]),
    "huge integer": raw(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"\0" * 8),
    "entry is not a table": raw({"w": 5}),
    "entry lacks a shape": raw({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "unknown dtype": raw({"w": entry(dtype="F7")}, b"\0" * 8),
    "dtype is a number": raw({"w": entry(dtype=3)}, b"\0" * 8),
    "negative offset": raw({"w": entry(-8, 0)}, b"\0" * 8),
    "offsets reversed": raw({"w": entry(8, 0)}, b"\0" * 8),
    "one offset": raw({"w": entry() | {"data_offsets": [0]}}, b"\0" * 8),
    "float offset": raw({"w": entry(0.0, 8.0)}, b"\0" * 8),
    "offset true": raw({"w": entry(False, True, [1], "U8")}, b"\0"),
    "past the end": raw({"w": entry(0, 16, [4])}, b"\0" * 8),
    "far past the end": raw({"w": entry(0, 2**62, [2**60])}, b"\0" * 8),
    "negative size": raw({"w": entry(shape=[-2])}, b"\0" * 8),
    "shape is text": raw({"w": entry(shape="2")}, b"\0" * 8),
    "shape too large": raw({"w": entry(shape=[2**62, 2**62])}, b"\0" * 8),
    "shape wraps to 8 bytes": raw({"w": entry(shape=[2**62, 4, 2**62])}, b"\0" * 8),
    "too many dimensions": raw({"w": entry(shape=[1] * 100 + [2])}, b"\0" * 8),
    "shape and size disagree": raw({"w": entry(shape=[3])}, b"\0" * 8),
    "trailing bytes": raw({"w": entry()}, b"\0" * 9),
    "truncated": raw({"w": entry()}, b"\0" * 7),
    "gap": raw({"v": entry(0, 8), "w": entry(12, 20)}, b"\0" * 20),
    "overlap": raw({"v": entry(0, 8), "w": entry(4, 12)}, b"\0" * 12),
    "same bytes twice": raw({"v": entry(0, 8), "w": entry(0, 8)}, b"\0" * 8),
    "same name twice": raw(
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"\0\0",
    ),
    "metadata is a list": raw({"__metadata__": [1], "w": entry()}, b"\0" * 8),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found_fast_and_names_the_file(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie])
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"model.safetensors") as e:
        Checkpoint.open(tmp_path)
    assert time.perf_counter() - started < 1
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@settings(max_examples=150, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4), st.integers(-5, 5))
def test_a_mutated_file_is_refused_or_read_within_its_bounds(
    tmp_path: Path, edits: list[tuple[int, int]], cut: int
) -> None:
    path = tmp_path / "m.safetensors"
    save(path, {"a.weight": torch.arange(8.0), "b": torch.arange(6, dtype=torch.int16).reshape(2, 3)})
    data = bytearray(path.read_bytes())
    for at, value in edits:
        data[at % len(data)] = value
    path.write_bytes(bytes(data[:cut] if cut < 0 else data + b"x" * cut))
    try:
        c = Checkpoint.open(path)
    except CheckpointError:
        return
    assert sum(c.nbytes(name) for name in c.names()) <= len(data)
    for name in c.names():
        assert c.tensor(name).numel() * c.dtype(name).itemsize == c.nbytes(name)


def sharded(path: Path) -> dict[str, torch.Tensor]:
    tensors = {f"layers.{i}.w": torch.full((100,), float(i)) for i in range(6)}
    for i in range(6):
        save(
            path / f"part-{i}.safetensors",
            {f"layers.{i}.w": tensors[f"layers.{i}.w"], f"layers.{i}.n": torch.ones(3, dtype=torch.uint8)},
        )
    return tensors


def test_merge_joins_parts_into_one_file_equal_to_save(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    parts = sorted(tmp_path.glob("part-*"))
    (out := tmp_path / "out").mkdir()
    assert merge(parts, out) == [out / "model.safetensors"]
    save(
        tmp_path / "whole.safetensors", tensors | {f"layers.{i}.n": torch.ones(3, dtype=torch.uint8) for i in range(6)}
    )
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    merge(parts[::-1], out)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_merge_into_shards_reads_back_and_has_the_transformers_index(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    (out := tmp_path / "out").mkdir()
    written = merge(sorted(tmp_path.glob("part-*")), out, max_shard_bytes=900)
    assert [f.name for f in written] == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)] + [
        "model.safetensors.index.json"
    ]
    index = json.loads(written[-1].read_text())
    assert index["metadata"]["total_size"] == 6 * 403
    assert all(f.stat().st_size < 900 + 1000 for f in written[:3])
    c = Checkpoint.open(out)
    assert len(c) == 12 and len(c.files) == 3
    assert all(same(c.tensor(name), t) for name, t in tensors.items())
    theirs = {k: v for f in written[:3] for k, v in safetensors.torch.load_file(f).items()}
    assert sorted(theirs) == sorted(index["weight_map"]) == c.names()


def test_merge_refuses_a_tensor_in_two_parts(tmp_path: Path) -> None:
    for n in "ab":
        save(tmp_path / f"{n}.safetensors", {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"'w' is in a.safetensors as well"):
        merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i["weight_map"].update(x="model-00001-of-00003.safetensors"), "'x' is not in"),
        (lambda i: i["weight_map"].update(x="absent.safetensors"), "absent.safetensors: the file is missing"),
        (lambda i: i["weight_map"].update(x="../../etc/passwd"), "not a file name"),
        (lambda i: i["weight_map"].update(x=5), "not a file name"),
        (lambda i: i.pop("weight_map"), "no weight_map"),
        (lambda i: i.update(weight_map=[]), "no weight_map"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change, message: str) -> None:
    sharded(tmp_path)
    (out := tmp_path / "out").mkdir()
    index = merge(sorted(tmp_path.glob("part-*")), out, max_shard_bytes=900)[-1]
    table = json.loads(index.read_text())
    change(table)
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(out)


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(RequestError, match=r"no such file or directory: .*smollm3 .*holds smollm2"):
        Checkpoint.open(tmp_path / "smollm3")
    with pytest.raises(RequestError, match=r"no model.safetensors .it is empty"):
        Checkpoint.open(tmp_path / "smollm2")
    (tmp_path / "smollm2" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(RequestError, match=r"is a pickle.*refused.*safe_serialization"):
        Checkpoint.open(tmp_path / "smollm2")
    with pytest.raises(RequestError, match=r"is a pickle"):
        Checkpoint.open(tmp_path / "smollm2" / "pytorch_model.bin")
    for i in (1, 2):
        save(tmp_path / "smollm2" / f"model-0000{i}-of-00002.safetensors", {f"w{i}": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"2 safetensors files but no model.safetensors.index.json"):
        Checkpoint.open(tmp_path / "smollm2")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(FewbitsError, match=r"disk full while writing .*model.safetensors"):
        save(tmp_path / "model.safetensors", {"w": torch.ones(4)})
    assert list(tmp_path.iterdir()) == []


def test_dev_full_is_a_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "model.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(FewbitsError, match=r"disk full"):
        save(tmp_path / "model.safetensors", {"w": torch.ones(1 << 16)})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"w": torch.ones(4)})
    before = path.read_bytes()

    def interrupted(t: torch.Tensor) -> memoryview:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"w": torch.zeros(4)})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"'w' is torch.complex128"):
        save(tmp_path / "m.safetensors", {"w": torch.ones(1, dtype=torch.complex128)})
