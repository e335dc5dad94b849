"""Reading and writing safetensors: memory-mapped in, streamed out, every offset checked before it is believed.

A safetensors file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, and
the tensors' bytes without gaps (specification: the ``safetensors`` project). No pickle is ever opened.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fewbits.errors import CheckpointError, FewbitsError, RequestError

# In the order in which the safetensors library sorts tensors, so that we write the same bytes.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: i for i, name in enumerate(DTYPES)}
_HEADER_LIMIT = 100_000_000  # the safetensors library's own limit
_CHUNK = 16 << 20
_INDEX = "model.safetensors.index.json"
_GIVE = "give a transformers directory or a .safetensors file"
_AGAIN = "download the model again"
_DAMAGED = "the file is damaged"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class Slot:
    """One tensor in one file: ``start`` and ``end`` are byte positions counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The tensors of a safetensors file or of a directory of them, read-only.

    Tensors are views into memory maps: they cost no memory until they are touched, and :meth:`release` gives it back.
    Writing to one crashes the process, as any write to read-only memory does: clone first.
    """

    def __init__(self, slots: Mapping[str, tuple[Path, Slot]], files: Sequence[Path]):
        self._slots = dict(slots)
        self._maps = {path: _map(path) for path in files}
        self.files: tuple[Path, ...] = tuple(files)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a transformers directory or a single ``.safetensors`` file.

        Raises RequestError when there is nothing to open (or only pickles), CheckpointError when it is damaged.
        """
        path = Path(path)
        if path.is_dir():
            return cls._open_directory(path)
        if not path.exists():
            raise RequestError(f"no such file or directory: {path}{_nearby(path)}; {_GIVE}")
        if path.suffix != ".safetensors":
            raise RequestError(f"{path} is not a .safetensors file{_pickle_hint(path)}; {_GIVE}")
        return cls({s.name: (path, s) for s in read_header(path)}, [path])

    @classmethod
    def _open_directory(cls, path: Path) -> Checkpoint:
        single, index = path / "model.safetensors", path / _INDEX
        if single.is_file() or not index.is_file():
            return cls.open(single if single.is_file() else _only_file(path))
        shards = _read_index(index)
        slots: dict[str, tuple[Path, Slot]] = {}
        for shard, names in shards.items():
            found = {s.name: s for s in read_header(path / shard)}
            for name in names:
                if name not in found:
                    raise CheckpointError(f"{index}: tensor {name!r} is not in {shard}, as it says; {_AGAIN}")
                slots[name] = (path / shard, found[name])
        return cls(slots, [path / shard for shard in shards])

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slot(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._slot(name)[1].dtype]

    def nbytes(self, name: str) -> int:
        """Bytes that the tensor takes in its file."""
        slot = self._slot(name)[1]
        return slot.end - slot.start

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` as a read-only view into its file. Raises CheckpointError when there is none."""
        path, slot = self._slot(name)
        dtype = DTYPES[slot.dtype]
        if slot.end == slot.start:
            return torch.empty(slot.shape, dtype=dtype)
        raw = self._maps[path][1][slot.start : slot.end]
        if slot.start % dtype.itemsize:
            raw = raw.clone()  # files of other writers need not be aligned, torch's views must be
        return raw.view(dtype).reshape(slot.shape)

    def release(self) -> None:
        """Give the resident pages of all files back to the system; tensors stay valid and are read again."""
        for pages, _ in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(len(pages) for pages, _ in self._maps.values())

    def _slot(self, name: str) -> tuple[Path, Slot]:
        try:
            return self._slots[name]
        except KeyError:
            raise CheckpointError(f"{self.files[0].parent}: there is no tensor {name!r} in this checkpoint") from None


def read_header(path: Path) -> list[Slot]:
    """The tensors of one file, in file order; every claim checked against the file's size. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            prefix = f.read(8)
            if prefix == b"version ":
                raise CheckpointError(f"{path} is a git-lfs pointer, not the model; run `git lfs pull`")
            length = int.from_bytes(prefix, "little")
            if size < 8 or not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{path}: not safetensors, or truncated (header {length}, file {size} bytes)")
            header = f.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; {_AGAIN}") from None
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    entries = _parse(path, header)
    slots = [_slot(path, name, entry, 8 + length, size) for name, entry in entries.items()]
    slots.sort(key=lambda s: (s.start, s.end))
    position = 8 + length
    for slot in slots:
        if slot.start != position:
            kind = "overlaps the one before it" if slot.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {slot.name!r} {kind}; {_DAMAGED}")
        position = slot.end
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor; {_DAMAGED}")
    return slots


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
            raise CheckpointError(f"{path}: {twice[:200]!r} appears twice in the header; {_DAMAGED}")
        return found

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not JSON ({str(e)[:80]}); {_DAMAGED}") from None
    if not isinstance(entries, dict) or not isinstance(entries.pop("__metadata__", {}), dict):
        raise CheckpointError(f"{path}: the header is not a table of tensors; {_DAMAGED}")
    return entries


def _slot(path: Path, name: str, entry: Any, data: int, size: int) -> Slot:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name[:200]!r} {what}; {_DAMAGED}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(f"has dtype {str(dtype)[:40]!r}, not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 64:
        raise damaged(f"has shape {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1] or offsets[1] > size - data:
        raise damaged(f"lies at {str(offsets)[:80]} of {size - data} bytes")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise damaged(f"of shape {str(shape)[:80]} and dtype {dtype} does not take {offsets[1] - offsets[0]} bytes")
    return Slot(name, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _read_index(index: Path) -> dict[str, list[str]]:
    """Tensor names by shard file. Raises CheckpointError."""
    if index.stat().st_size > _HEADER_LIMIT:
        raise CheckpointError(f"{index}: larger than {_HEADER_LIMIT} bytes; {_DAMAGED}")
    table = _parse(index, index.read_bytes()).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: has no weight_map; {_DAMAGED}")
    shards: dict[str, list[str]] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {name[:200]!r} is in {str(shard)[:80]!r}, not a file name; {_DAMAGED}")
        shards.setdefault(shard, []).append(name)
    return dict(sorted(shards.items()))


def _only_file(path: Path) -> Path:
    """The safetensors file of a directory without the usual names."""
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{path}: {len(files)} safetensors files but no {_INDEX}; {_AGAIN}")
    pickles = sorted(f for pattern in _PICKLES for f in path.glob(pattern))
    if pickles:
        raise RequestError(f"{path} holds no safetensors file{_pickle_hint(pickles[0])}")
    there = ", ".join(sorted(f.name for f in path.iterdir())[:5])
    raise RequestError(f"{path} holds no model.safetensors ({there or 'it is empty'}); {_GIVE}")


def _pickle_hint(path: Path) -> str:
    if not any(path.match(pattern) for pattern in _PICKLES):
        return ""
    return (
        f": {path.name} is a pickle, which can run code when opened, and is refused; convert it where it is trusted: "
        "`AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir, safe_serialization=True)`"
    )


def _nearby(path: Path) -> str:
    parent = next(p for p in path.absolute().parents if p.is_dir())
    readable = parent.iterdir() if os.access(parent, os.R_OK) else ()
    there = sorted(f.name for f in readable if not f.name.startswith("."))[:5]
    return f" ({parent} holds {', '.join(there)})" if there else ""


def _map(path: Path) -> tuple[mmap.mmap, Tensor]:
    with path.open("rb") as f:
        pages = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the buffer is not writable: that is the point
        return pages, torch.frombuffer(pages, dtype=torch.uint8)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` complete and on disk, or not at all.

    It is written beside ``path`` under ``<name>.partial``. Raises FewbitsError when the disk is full or not writable.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
        if os.name == "posix":
            _sync_directory(path.parent)
    except OSError as e:
        partial.unlink(missing_ok=True)
        why = "disk full while writing" if e.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot write ({e.strerror})"
        raise FewbitsError(f"{why} {path}; nothing was left there: free space or choose another place") from e
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor at a time: same tensors, same bytes, whatever the order of ``tensors``.

    ``metadata`` is added to ``{"format": "pt"}``. Raises FewbitsError when the disk is full, RequestError for a dtype
    that safetensors does not have.
    """
    for name, t in tensors.items():
        if t.dtype not in _NAMES:
            raise RequestError(f"tensor {name!r} is {t.dtype}, which cannot be stored; allowed: {', '.join(DTYPES)}")
    slots = [Slot(name, _NAMES[t.dtype], tuple(t.shape), 0, t.numel() * t.itemsize) for name, t in tensors.items()]
    _write(Path(path), slots, lambda s: [_bytes(tensors[s.name])], metadata or {})


def merge(parts: Sequence[str | Path], out: str | Path, max_shard_bytes: int = 4_000_000_000) -> list[Path]:
    """Join safetensors files into the directory ``out`` as transformers names them, and return the files written.

    One ``model.safetensors`` when everything fits into ``max_shard_bytes``, otherwise numbered shards and their index.
    Tensors keep the order of ``parts``; bytes are copied in chunks of 16 MiB. The parts are left alone. Raises
    CheckpointError when a part is damaged or two parts hold the same tensor.
    """
    out = Path(out)
    source: dict[str, tuple[Path, Slot]] = {}
    for part in map(Path, parts):
        for slot in sorted(read_header(part), key=lambda s: s.name):
            if slot.name in source:
                raise CheckpointError(f"{part}: tensor {slot.name!r} is in {source[slot.name][0].name} as well")
            source[slot.name] = (part, slot)
    shards = _fill(list(source.values()), max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(names) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write(out / name, shard, lambda s: _ranges(*source[s.name]), {})
    if len(shards) == 1:
        return [out / names[0]]
    table = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
    total = sum(s.end - s.start for _, s in source.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    with atomic(out / _INDEX) as f:
        f.write((json.dumps(index, indent=2) + "\n").encode())
    return [out / name for name in (*names, _INDEX)]


def _fill(found: Iterable[tuple[Path, Slot]], most: int) -> list[list[Slot]]:
    shards: list[list[Slot]] = [[]]
    used = 0
    for _, slot in found:
        if shards[-1] and used + slot.end - slot.start > most:
            shards.append([])
            used = 0
        shards[-1].append(slot)
        used += slot.end - slot.start
    return shards


def _ranges(path: Path, slot: Slot) -> Iterator[bytes]:
    with path.open("rb") as f:
        f.seek(slot.start)
        left = slot.end - slot.start
        while left:
            if not (chunk := f.read(min(left, _CHUNK))):
                raise CheckpointError(f"{path}: truncated while it was being read")
            yield chunk
            left -= len(chunk)


def _bytes(t: Tensor) -> memoryview:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(
    path: Path, slots: Sequence[Slot], data: Callable[[Slot], Iterable[bytes | memoryview]], metadata: Mapping[str, str]
) -> None:
    slots = sorted(slots, key=lambda s: (-_RANK[s.dtype], s.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    position = 0
    for s in slots:
        end = position + s.end - s.start
        header[s.name] = {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for s in slots:
            for chunk in data(s):
                f.write(chunk)
