"""Where the bits of GGUF's block types lie: each type is an ordered list of fields, packed and unpacked by one rule.

A :class:`Bits` field stores ``width`` bits of every value from bit ``low`` on. Values go in chunks; a chunk of ``n``
values takes ``n * width / 8`` bytes, and byte ``l`` holds the values ``l, l + stride, l + 2 stride, ...`` from its
lowest bits upwards, where ``stride`` is the number of bytes. (Source: the structs of ggml-common.h.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import CheckpointError
from fewbits.grids import Block, Params

Pieces = dict[str, Tensor]
"""Values of a tensor by name, each ``[blocks, values per block]``: ``codes`` and parameters, integers as uint8."""


@dataclass(frozen=True)
class Half:
    """One half-precision number per block."""

    name: str
    size: int = 2

    def pack(self, p: Pieces) -> Tensor:
        return p[self.name].contiguous().view(torch.uint8)

    def unpack(self, raw: Tensor, p: Pieces) -> None:
        p[self.name] = raw.contiguous().view(torch.float16)


@dataclass(frozen=True)
class Bits:
    """See the file's head. ``name`` may join two values: "scales+mins"."""

    name: str
    count: int
    width: int
    chunk: int
    low: int = 0

    @property
    def size(self) -> int:
        return self.count * self.width // 8

    def pack(self, p: Pieces) -> Tensor:
        values = torch.cat([p[n] for n in self.name.split("+")], 1)
        per_byte = 8 // self.width
        part = (values >> self.low) & (2**self.width - 1)
        part = part.view(len(values), -1, per_byte, self.chunk // per_byte)
        byte = part[:, :, 0].clone()
        for k in range(1, per_byte):
            byte |= part[:, :, k] << (self.width * k)
        return byte.reshape(len(values), self.size)

    def unpack(self, raw: Tensor, p: Pieces) -> None:
        per_byte = 8 // self.width
        chunks = raw.reshape(len(raw), -1, 1, self.chunk // per_byte)
        shifts = torch.arange(0, 8, self.width, dtype=torch.uint8).view(1, 1, -1, 1)
        part = ((chunks >> shifts) & (2**self.width - 1)).reshape(len(raw), self.count) << self.low
        names = self.name.split("+")
        for name, piece in zip(names, part.chunk(len(names), 1), strict=True):
            p[name] = p[name] | piece if name in p else piece


@dataclass(frozen=True)
class SixBit:
    """Eight scales and eight offsets of six bits in twelve bytes (Q4_K, Q5_K)."""

    size: int = 12

    def pack(self, p: Pieces) -> Tensor:
        s, m = p["scales"], p["mins"]
        first = torch.cat([s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6)], 1)
        return torch.cat([first, (s[:, 4:] & 15) | (m[:, 4:] << 4)], 1)

    def unpack(self, raw: Tensor, p: Pieces) -> None:
        a, b, c = raw[:, :4], raw[:, 4:8], raw[:, 8:]
        p["scales"] = torch.cat([a & 63, (c & 15) | (a >> 6 << 4)], 1)
        p["mins"] = torch.cat([b & 63, (c >> 4) | (b >> 6 << 4)], 1)


@dataclass(frozen=True)
class Trits:
    """Codes 0 .. 2, five to a byte: the base-3 number ``v`` of 243 is stored as ``ceil(256 v / 243)`` (TQ1_0)."""

    size: int = 52

    def pack(self, p: Pieces) -> Tensor:
        codes = p["codes"]
        a = codes[:, :160].reshape(-1, 5, 32)
        b = codes[:, 160:240].reshape(-1, 5, 16)
        c = torch.cat([codes[:, 240:].reshape(-1, 4, 4), torch.zeros_like(codes[:, :4]).reshape(-1, 1, 4)], 1)
        return torch.cat([self._digits(part) for part in (a, b, c)], 1)

    @staticmethod
    def _digits(part: Tensor) -> Tensor:
        v = torch.zeros_like(part[:, 0], dtype=torch.int32)
        for k in range(5):
            v = 3 * v + part[:, k]
        return ((256 * v + 242) // 243).to(torch.uint8)

    def unpack(self, raw: Tensor, p: Pieces) -> None:
        parts = [self._codes(piece) for piece in (raw[:, :32], raw[:, 32:48], raw[:, 48:])]
        p["codes"] = torch.cat([parts[0], parts[1], parts[2][:, :16]], 1)

    @staticmethod
    def _codes(raw: Tensor) -> Tensor:
        powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8).view(1, 5, 1)
        return ((raw[:, None] * powers).int() * 3 >> 8).to(torch.uint8).reshape(len(raw), -1)


@dataclass(frozen=True)
class Format:
    """``bias`` is what is added to the stored integers of a value so that they are not negative."""

    fields: tuple[Half | Bits | SixBit | Trits, ...]
    bias: Mapping[str, int]


def _format(*fields: Half | Bits | SixBit | Trits, **bias: int) -> Format:
    return Format(fields, bias)


D, M = Half("d"), Half("m")


def _codes(count: int, width: int, chunk: int, low: int = 0) -> Bits:
    return Bits("codes", count, width, chunk, low)


FORMATS: dict[str, Format] = {
    "q4_0": _format(D, _codes(32, 4, 32)),
    "q4_1": _format(D, M, _codes(32, 4, 32)),
    "q5_0": _format(D, _codes(32, 1, 8, 4), _codes(32, 4, 32)),
    "q5_1": _format(D, M, _codes(32, 1, 8, 4), _codes(32, 4, 32)),
    "q8_0": _format(D, _codes(32, 8, 32), codes=128),
    "q2_k": _format(Bits("scales+mins", 32, 4, 32), _codes(256, 2, 128), D, M),
    "q3_k": _format(
        _codes(256, 1, 256, 2),
        _codes(256, 2, 128),
        Bits("scales", 16, 4, 16),
        Bits("scales", 16, 2, 16, 4),
        D,
        scales=32,
    ),
    "q4_k": _format(D, M, SixBit(), _codes(256, 4, 64)),
    "q5_k": _format(D, M, SixBit(), _codes(256, 1, 256, 4), _codes(256, 4, 64)),
    "q6_k": _format(_codes(256, 4, 128), _codes(256, 2, 128, 4), Bits("scales", 16, 8, 16), D),
    "iq4_nl": _format(D, _codes(32, 4, 32)),
    "iq4_xs": _format(D, Bits("scales", 8, 2, 4, 4), Bits("scales", 8, 4, 2), _codes(256, 4, 32), scales=32),
    "tq1_0": _format(Trits(), D),
    "tq2_0": _format(_codes(256, 2, 128), D),
    "mxfp4": _format(Bits("d", 1, 8, 1), _codes(32, 4, 32)),
}


def pack(grid: Block, codes: Tensor, params: Params) -> Tensor:
    """The bytes of a weight: uint8 ``[out, in / block * size]``."""
    f, t = FORMATS[grid.name], grid.type
    rows, blocks = codes.shape[0], codes.shape[1] // t.shape.block
    pieces = {"codes": codes} | params
    flat = {k: _biased(v, f.bias.get(k, 0)).reshape(rows * blocks, -1) for k, v in pieces.items() if k != "g_idx"}
    return torch.cat([field.pack(flat) for field in f.fields], 1).reshape(rows, blocks * t.size)


def unpack(grid: Block, raw: Tensor) -> tuple[Tensor, Params]:
    """Inverse of :func:`pack`. Raises CheckpointError when rows are not whole blocks."""
    f, t = FORMATS[grid.name], grid.type
    if raw.ndim != 2 or raw.dtype != torch.uint8 or raw.shape[1] % t.size:
        raise CheckpointError(f"rows of {list(raw.shape)[1:]} bytes are not whole {grid.name} blocks of {t.size} bytes")
    rows, blocks = raw.shape[0], raw.shape[1] // t.size
    flat, position = raw.reshape(rows * blocks, t.size), 0
    pieces: Pieces = {}
    for field in f.fields:
        field.unpack(flat[:, position : position + field.size], pieces)
        position += field.size
    found = {k: _unbiased(k, v, f.bias.get(k, 0)).reshape(rows, -1) for k, v in pieces.items()}
    return found.pop("codes"), found


def _biased(v: Tensor, bias: int) -> Tensor:
    return v if v.dtype == torch.float16 else v.view(torch.uint8) + bias


def _unbiased(name: str, v: Tensor, bias: int) -> Tensor:
    if v.dtype == torch.float16:
        return v
    v = v - bias if bias else v
    return v.view(torch.int8) if name in ("scales", "mins") else v
