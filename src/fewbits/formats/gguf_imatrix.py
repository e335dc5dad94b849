"""llama.cpp's importance matrices: mean squares of the inputs of each matrix, in either of its two file formats.

The old one (``.dat``): i32 entries; each i32 length, name, i32 calls, i32 values, f32 values = mean square * calls;
then i32 chunks and the name of the text. The new one is a GGUF file with ``<tensor>.in_sum2`` and ``<tensor>.counts``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbits import storage
from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import gguf

SUM, COUNT = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """By GGUF's tensor name: ``sums`` of squares float32 ``[in]`` over ``counts`` observations."""

    sums: Mapping[str, Tensor]
    counts: Mapping[str, float]
    dataset: str = ""
    chunks: int = 0
    chunk_size: int = field(default=512)

    def mean_squares(self) -> dict[str, Tensor]:
        """What the searches take. Inputs of a tensor that was never observed weigh alike, as for llama-quantize."""
        return {n: s / c if (c := self.counts[n]) > 0 else torch.ones_like(s) for n, s in self.sums.items()}

    def write(self, path: Path) -> None:
        """The old format for a name that ends in ``.dat``, else the new one."""
        if path.suffix == ".dat":
            self._write_old(path)
            return
        metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": [self.dataset],
            "imatrix.chunk_count": self.chunks,
            "imatrix.chunk_size": self.chunk_size,
        }
        tensors = {n + SUM: s.float().reshape(1, -1) for n, s in self.sums.items()}
        tensors |= {n + COUNT: torch.tensor([[float(c)]]) for n, c in self.counts.items()}
        infos = [gguf.Info(n, "f32", tuple(t.shape)) for n, t in sorted(tensors.items())]
        gguf.write(path, metadata, infos, lambda i: [tensors[i.name].contiguous().numpy().tobytes()])

    def _write_old(self, path: Path) -> None:
        raw = bytearray(struct.pack("<i", len(self.sums)))
        calls = max(1, self.chunks)
        for name, mean in self.mean_squares().items():
            text, values = name.encode(), (mean.float() * calls).numpy().astype("<f4")
            raw += struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, len(values)) + values.tobytes()
        text = self.dataset.encode()
        raw += struct.pack("<ii", self.chunks, len(text)) + text
        with storage.atomic(path) as f:
            f.write(raw)


def read(path: str | Path) -> Imatrix:
    """Either format. Raises RequestError when there is no such file, CheckpointError when it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"no such file: {path}; give an importance matrix of llama.cpp")
    with path.open("rb") as f:
        new = f.read(4) == gguf.MAGIC
    return _read_new(path) if new else _read_old(path)


def _read_new(path: Path) -> Imatrix:
    file = gguf.read(path)
    sums, counts = {}, {}
    for name in file.infos:
        if name.endswith(SUM):
            module = name.removesuffix(SUM)
            if module + COUNT not in file.infos:
                raise CheckpointError(f"{path}: {name!r} has no counts; make the matrix again")
            total, count = file.tensor(name).float(), file.tensor(module + COUNT).float()
            if count.numel() != 1:
                raise RequestError(f"{path}: {module!r} has {count.numel()} experts; only dense models can be read")
            sums[module], counts[module] = total.reshape(-1), float(count)
    names = file.metadata.get("imatrix.datasets") or [""]
    return Imatrix(sums, counts, str(names[0]), int(file.metadata.get("imatrix.chunk_count", 0)))


def _read_old(path: Path) -> Imatrix:
    raw = path.read_bytes()
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(raw):
            raise CheckpointError(f"{path} is no importance matrix, or truncated; make it again")
        at += count
        return raw[at - count : at]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    sums, counts = {}, {}
    for _ in range(integer()):
        name = take(integer()).decode("utf-8", "replace")
        calls, values = integer(), integer()
        sums[name] = torch.from_numpy(np.frombuffer(take(4 * values), "<f4").copy())
        counts[name] = float(max(calls, 1))
    chunks = integer() if at + 4 <= len(raw) else 0
    dataset = take(integer()).decode("utf-8", "replace") if at + 4 <= len(raw) else ""
    return Imatrix(sums, counts, dataset, chunks)
