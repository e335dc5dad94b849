"""The GGUF container, version 3: metadata, tensor table, data. Reads hostile files safely, writes tensor by tensor.

Little endian: ``"GGUF"``, u32 version, u64 tensors, u64 keys; then the keys (string, u32 type, value), the tensor table
(string, u32 dimensions, u64 sizes with the fastest first, u32 type, u64 offset), padding, data. Strings are a u64
length and UTF-8. Offsets count from the start of the data and are multiples of ``general.alignment``.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits import storage
from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import gguf_blocks
from fewbits.grids import BLOCK_TYPES, Block

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_STRINGS = 4_000_000  # of a file: no vocabulary comes near, and a parser of hostile files needs an end
MOST_TENSORS = 200_000
MOST_NAME = 1024
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
DENSE = {"f32": (0, torch.float32), "f16": (1, torch.float16), "bf16": (30, torch.bfloat16), "f64": (28, torch.float64)}
DENSE |= {"i8": (24, torch.int8), "i16": (25, torch.int16), "i32": (26, torch.int32), "i64": (27, torch.int64)}

# Types that we name but do not decode ourselves: number -> (name, columns per block, bytes per block).
FOREIGN = {16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50)}
FOREIGN |= {21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 29: ("iq1_m", 256, 56)}
FOREIGN |= {40: ("nvfp4", 64, 36)}

KINDS: dict[int, tuple[str, int, int]] = {
    **{t.shape.number: (name, t.shape.block, t.size) for name, t in BLOCK_TYPES.items()},
    **{number: (name, 1, dtype.itemsize) for name, (number, dtype) in DENSE.items()},
    **FOREIGN,
}
NUMBER = {name: number for number, (name, _, _) in KINDS.items()}


@dataclass(frozen=True)
class Info:
    """A tensor of a file: ``shape`` as torch has it (``(out, in)``), ``kind`` a type by name, its bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the data, padding left out."""
        _, block, size = KINDS[NUMBER[self.kind]]
        return math.prod(self.shape) // block * size


class File:
    """An open file: ``metadata`` (arrays as lists), ``infos`` by tensor name. Tensors are read on demand.

    ``paths`` are the files that it consists of: several when it was split.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], infos: dict[str, Info], pages: mmap.mmap | None):
        self.path, self.metadata, self.infos, self._pages = path, metadata, infos, pages
        self.paths: tuple[Path, ...] = (path,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the buffer is not writable: that is the point
            self._bytes = torch.frombuffer(pages, dtype=torch.uint8) if pages else torch.empty(0, dtype=torch.uint8)

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor: a read-only view, uint8 ``[nbytes]``."""
        i = self._info(name)
        return self._bytes[i.start : i.start + i.nbytes]

    def tensor(self, name: str) -> Tensor:
        """The tensor, float32 unless it holds integers or was stored in another dense type. Raises RequestError for a
        type that we cannot decode.
        """
        i, raw = self._info(name), self.raw(name)
        if i.kind in DENSE:
            return raw.clone().view(DENSE[i.kind][1]).reshape(i.shape)
        rows = raw.view(math.prod(i.shape[:-1]), -1)
        if i.kind in BLOCK_TYPES:
            grid = Block(i.kind)
            return grid.decode(*gguf_blocks.unpack(grid, rows)).reshape(i.shape)
        return torch.from_numpy(self._foreign(i, rows.numpy())).reshape(i.shape)

    def _foreign(self, i: Info, rows: np.ndarray) -> np.ndarray:
        import gguf

        try:
            return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(NUMBER[i.kind]))
        except (NotImplementedError, KeyError, ValueError):
            raise RequestError(f"{self.path}: tensor {i.name!r} is {i.kind}, which cannot be decoded") from None

    def _info(self, name: str) -> Info:
        if name not in self.infos:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r} in this file")
        return self.infos[name]

    def release(self) -> None:
        """Give the resident pages back to the system."""
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Cursor:
    """Reads values in order; every length is checked against what is left before anything is allocated."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at, self.strings = path, data, 0, 0

    def bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; the file is damaged: download it again")

    def take(self, count: int, what: str) -> memoryview:
        if count < 0 or count > len(self.data) - self.at:
            raise self.bad(f"{what} takes {count} bytes at {self.at}, the file has {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self.take(size, what))[0]

    def string(self, what: str, most: int | None = None) -> str:
        self.strings += 1
        if self.strings > MOST_STRINGS:
            raise self.bad(f"it holds more than {MOST_STRINGS} strings")
        length = self.number("Q", what)
        if most is not None and length > most:
            raise self.bad(f"{what} of {length} bytes; at most {most} are allowed")
        return str(self.take(length, what), "utf-8", "replace")

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string(f"the value of {key!r}")
        if kind in NUMBERS:
            return bool(self.number("B", key)) if NUMBERS[kind] == "?" else self.number(NUMBERS[kind], key)
        if kind != ARRAY or depth > 2:
            raise self.bad(f"key {key!r} has type {kind}, nested {depth} times")
        inner, count = self.number("I", key), self.number("Q", key)
        if inner in NUMBERS:
            raw = self.take(count * struct.calcsize("<" + NUMBERS[inner]), f"array {key!r}")
            found: list[Any] = np.frombuffer(raw, np.dtype("<" + NUMBERS[inner])).tolist()
            return found
        if count * 8 > len(self.data) - self.at:
            raise self.bad(f"array {key!r} says it has {count} elements")
        return [self.value(inner, key, depth + 1) for _ in range(count)]


class Split(File):
    """A model in numbered files, as one: the metadata of the first, the tensors of all."""

    def __init__(self, parts: Sequence[File]):
        super().__init__(parts[0].path, parts[0].metadata, {n: i for p in parts for n, i in p.infos.items()}, None)
        self.paths = tuple(p.path for p in parts)
        self._home = {n: p for p in parts for n in p.infos}

    def raw(self, name: str) -> Tensor:
        return self._home[self._info(name).name].raw(name)

    def release(self) -> None:
        for part in set(self._home.values()):
            part.release()


def read(path: str | Path) -> File:
    """Open a file; any one of the numbered files of a split model opens all of them.

    Raises RequestError when there is none, CheckpointError for anything that is not whole and sound.
    """
    file = _read_one(Path(path))
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return file
    place = _NUMBERED.fullmatch(file.path.name)
    if place is None or int(place[3]) != count:
        raise CheckpointError(f"{path} is one of {count} files; give them the names NAME-00001-of-{count:05}.gguf")
    return _join(file, [file.path.with_name(f"{place[1]}-{k + 1:05}-of-{count:05}.gguf") for k in range(count)])


def _join(given: File, paths: Sequence[Path]) -> Split:
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise CheckpointError(f"{given.path} is one of {len(paths)} files, {missing[0]} is missing beside it")
    parts = [given if p == given.path else _read_one(p) for p in paths]
    for k, part in enumerate(parts):
        found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if found != (k, len(parts)):
            raise CheckpointError(f"{part.path} says that it is file {found[0]} of {found[1]}; download it again")
    whole = Split(parts)
    if len(whole.infos) != sum(len(p.infos) for p in parts):
        raise CheckpointError(f"{given.path}: two of its {len(parts)} files hold the same tensor; download them again")
    wanted = parts[0].metadata.get("split.tensors.count", len(whole.infos))
    if wanted != len(whole.infos):
        raise CheckpointError(f"{given.path}: its files hold {len(whole.infos)} tensors, not {wanted}")
    return whole


def _read_one(path: Path) -> File:
    if not path.is_file():
        raise RequestError(f"no such file: {path}; give a .gguf file")
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path}: {size} bytes are no GGUF file; download it again")
    with path.open("rb") as f:
        pages = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    with memoryview(pages) as data:
        c = _Cursor(path, data)
        if bytes(c.take(4, "the magic")) != MAGIC:
            raise CheckpointError(f"{path} does not begin with GGUF; give a .gguf file")
        version = c.number("I", "the version")
        if version not in (2, 3):
            raise CheckpointError(f"{path}: GGUF version {version} cannot be read; versions 2 and 3 can")
        tensors, keys = c.number("Q", "the number of tensors"), c.number("Q", "the number of keys")
        if tensors > MOST_TENSORS or 24 * tensors + 13 * keys > size:
            raise c.bad(f"it says it has {tensors} tensors and {keys} keys in {size} bytes")
        metadata = _metadata(c, keys)
        infos = _table(c, tensors, _alignment(c, metadata), size)
    return File(path, metadata, infos, pages)


def _metadata(c: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = c.string("a key", 65535)
        if key in found:
            raise c.bad(f"key {key[:80]!r} appears twice")
        found[key] = c.value(c.number("I", key[:80]), key[:80])
    return found


def _alignment(c: _Cursor, metadata: Mapping[str, Any]) -> int:
    a = metadata.get("general.alignment", ALIGNMENT)
    if type(a) is not int or not 1 <= a <= 1 << 20 or a & (a - 1):
        raise c.bad(f"general.alignment is {str(a)[:40]}, not a power of two")
    return a


def _table(c: _Cursor, count: int, alignment: int, size: int) -> dict[str, Info]:
    rows = [_entry(c) for _ in range(count)]
    data = c.at + -c.at % alignment
    found: dict[str, Info] = {}
    for name, kind, shape, offset in rows:
        info = Info(name, kind, shape, data + offset)
        if name in found:
            raise c.bad(f"tensor {name!r} appears twice")
        if offset % alignment:
            raise c.bad(f"tensor {name!r} lies at {offset}, no multiple of {alignment}")
        if info.start + info.nbytes > size:
            raise c.bad(f"tensor {name!r} ends at {info.start + info.nbytes}, the file at {size}")
        found[name] = info
    end = 0
    for info in sorted(found.values(), key=lambda i: i.start):
        if info.start < end:
            raise c.bad(f"tensor {info.name!r} overlaps the one before it")
        end = info.start + info.nbytes
    return found


def _entry(c: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    name = c.string("a tensor's name", MOST_NAME)
    dimensions = c.number("I", name)
    if not 1 <= dimensions <= 4:
        raise c.bad(f"tensor {name!r} has {dimensions} dimensions")
    sizes = [c.number("Q", name) for _ in range(dimensions)]
    number, offset = c.number("I", name), c.number("Q", name)
    if number not in KINDS:
        raise c.bad(f"tensor {name!r} has type {number}, which is unknown")
    kind, block, _ = KINDS[number]
    if not all(0 < s < 2**48 for s in sizes) or math.prod(sizes) >= 2**48 or sizes[0] % block:
        raise c.bad(f"tensor {name!r} of type {kind} has sizes {sizes}")
    return name, kind, tuple(reversed(sizes)), offset


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(
    path: str | Path, metadata: Mapping[str, Any], infos: Sequence[Info], data: Callable[[Info], Iterable[Any]]
) -> None:
    """Write a file: ``data`` gives the bytes of one tensor after the other, in chunks; nothing else is kept.

    Integers become u32 (i32 when negative, u64 when large), floats f32, lists arrays of their first element's type;
    a list of ints is i32. The file appears complete or not at all. Raises RequestError when a tensor's bytes do not
    fit its entry.
    """
    head, position = bytearray(), 0
    head += MAGIC + struct.pack("<IQQ", VERSION, len(infos), len(metadata))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    for info in infos:
        head += _string(info.name) + struct.pack("<I", len(info.shape))
        head += struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape))
        head += struct.pack("<IQ", NUMBER[info.kind], position)
        position += info.nbytes + -info.nbytes % ALIGNMENT
    head += bytes(-len(head) % ALIGNMENT)
    with storage.atomic(Path(path)) as f:
        f.write(head)
        for info in infos:
            written = 0
            for chunk in data(info):
                written += f.write(chunk)
            if written != info.nbytes:
                raise RequestError(f"tensor {info.name!r} has {written} bytes, {info.kind} {info.shape} needs others")
            f.write(bytes(-written % ALIGNMENT))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind = 5 if type(value[0]) is int else _kind(value[0])
        start = struct.pack("<IIQ", ARRAY, kind, len(value))
        if kind == STRING:
            return start + b"".join(map(_string, value))
        return start + np.array(value, np.dtype("<" + NUMBERS[kind])).tobytes()
    kind = _kind(value)
    return struct.pack("<I", kind) + (_string(value) if kind == STRING else struct.pack("<" + NUMBERS[kind], value))


def _kind(value: Any) -> int:
    if isinstance(value, str):
        return STRING
    if isinstance(value, np.generic):
        return next(k for k, code in NUMBERS.items() if code == value.dtype.char)
    if isinstance(value, bool):
        return 7
    if isinstance(value, float):
        return 6
    return 5 if value < 0 else 4 if value < 2**32 else 10
