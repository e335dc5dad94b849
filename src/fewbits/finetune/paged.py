"""AdamW whose states live on disk, in memory-mapped pages of which a bounded part is resident (arXiv 2305.14314, 3).

QLoRA pages optimizer states out of a GPU's memory when that is short; a CPU's analogue is a file. The file holds the
first moments of all parameters, then the second; parameters are updated a chunk at a time, and what lies beyond the
part that is kept is given back to the kernel after each chunk. The first pages stay, the others stream: with a cyclic
access no other policy keeps more. The arithmetic is torch.optim.AdamW's, in its order.

With ``bits=8`` moments are codes in blocks of 256 (arXiv 2110.02861): ``m ≈ map[code] * absmax``, the signed dynamic
map for the first moment, the unsigned one for the second.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import FewbitsError, RequestError
from fewbits.grids.codebook import Codebook, dynamic

BLOCK = 256
CHUNK = 1 << 16
"""Numbers updated at once; a temporary takes 256 KiB."""
PAGE = mmap.ALLOCATIONGRANULARITY
_PIECE = 1 << 20
_FOLIO = 2 << 20
"""Largest run of pages that the kernel maps at once around one that is touched."""


class PagedAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` (arXiv 1711.05101) with states in a file in directory ``folder``, gone with the object.

    ``memory`` are bytes of states that stay resident, None for all. Parameters are float32, contiguous, on the CPU.
    ``state_dict`` holds the step and the settings; the pages are saved and read by :meth:`save_pages` and
    :meth:`load_pages`, which copy files and need no memory.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bits: int = 32,
        memory: int | None = None,
        folder: str | Path | None = None,
    ):
        if bits not in (8, 32):
            raise RequestError(f"optimizer states of {bits} bits given; allowed: 32, 8")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        every = [p for group in self.param_groups for p in group["params"]]
        for p in every:
            if p.dtype != torch.float32 or p.device.type != "cpu" or not p.is_contiguous():
                what = f"{p.dtype} on {p.device}"
                raise RequestError(f"paged states need contiguous float32 parameters on the CPU; got {what}")
        self.steps, self.bits = 0, bits
        sizes = [-(-p.numel() // BLOCK) * BLOCK for p in every]  # blocks do not cross parameters
        begins = np.cumsum([0, *sizes])[:-1].tolist()
        self._begin = {p: int(b) for p, b in zip(every, begins, strict=True)}
        kind = _Moments8 if bits == 8 else _Moments32
        self._pages = _Pages(
            kind.size(sum(sizes)), folder, _kept(memory, kind.size(CHUNK) + kind.temporaries * 4 * CHUNK + _FOLIO)
        )
        self._moments = kind(self._pages, sum(sizes))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), lr, begin = group["betas"], float(group["lr"]), self._begin[p]
        size, root = lr / (1 - beta1**self.steps), (1 - beta2**self.steps) ** 0.5
        flat, g = p.view(-1), grad.reshape(-1).float()
        for a in range(0, len(flat), CHUNK):
            b = min(a + CHUNK, len(flat))
            w, d = flat[a:b], g[a:b]
            w.mul_(1 - lr * group["weight_decay"])
            with self._moments.at(begin + a, begin + b) as (m, v):
                m.lerp_(d, 1 - beta1)
                v.mul_(beta2).addcmul_(d, d, value=1 - beta2)
                w.addcdiv_(m, (v.sqrt() / root).add_(group["eps"]), value=-size)

    def state_dict(self) -> dict[str, Any]:
        """Steps and settings; see :meth:`save_pages` for the states."""
        return {"state": {}, "param_groups": super().state_dict()["param_groups"], "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.steps = int(state_dict["steps"])

    def save_pages(self, path: Path) -> None:
        """Copy the states into a file."""
        self._pages.save(path)

    def load_pages(self, path: Path) -> None:
        """Take the states from a file of :meth:`save_pages`. Raises FewbitsError when it has another size."""
        self._pages.load(path)

    @property
    def state_bytes(self) -> int:
        """Size of all states."""
        return self._pages.size


class _Pages:
    """A memory-mapped temporary file; beyond the first ``kept`` bytes, what was used goes back to the kernel."""

    def __init__(self, size: int, folder: str | Path | None, kept: int | None):
        self.size = size
        # without a name: whatever ends the process, the file is gone
        self.file = tempfile.TemporaryFile(dir=folder, prefix="optimizer-")  # noqa: SIM115
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file.fileno(), 0, max(size, 1))
            else:
                self.file.truncate(max(size, 1))
        except OSError as e:
            raise FewbitsError(
                f"no room for {size / 1e9:.2f} GB of optimizer states in {folder or tempfile.gettempdir()} "
                f"({e.strerror}); free space"
            ) from None
        self.map = mmap.mmap(self.file.fileno(), max(size, 1))
        self.kept = size if kept is None else kept

    def view(self, begin: int, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` numbers from byte ``begin``."""
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=begin)

    def release(self, end: int) -> None:
        """Bytes up to ``end`` were used: where they reach beyond the part that is kept, drop all of that from memory,
        since touching a page may have mapped its whole folio, before and behind it.
        """
        if end > self.kept and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED, self.kept, self.size - self.kept)

    def save(self, path: Path) -> None:
        # file and map are one page cache: what was written through the map is read from the file
        with path.open("wb") as f:
            for begin in range(0, self.size, _PIECE):
                f.write(os.pread(self.file.fileno(), min(_PIECE, self.size - begin), begin))

    def load(self, path: Path) -> None:
        if path.stat().st_size != self.size:
            raise FewbitsError(f"{path} holds {path.stat().st_size} bytes of optimizer states, not {self.size}")
        with path.open("rb") as f:
            for begin in range(0, self.size, _PIECE):
                os.pwrite(self.file.fileno(), f.read(_PIECE), begin)


class _Moments32:
    """Both moments in float32, of consecutive pieces of ``CHUNK`` numbers one after the other."""

    temporaries = 4

    def __init__(self, pages: _Pages, count: int):
        self.pages = pages

    @staticmethod
    def size(count: int) -> int:
        return 8 * count

    def at(self, begin: int, end: int) -> _Chunk:
        return _Chunk(self, begin, end)

    def load(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        n = end - begin
        return self.pages.view(8 * begin, n, torch.float32), self.pages.view(8 * begin + 4 * n, n, torch.float32)

    def store(self, begin: int, end: int, m: Tensor, v: Tensor) -> None:
        self.pages.release(8 * end)


class _Moments8:
    """Both moments as codes of a byte, and an absolute maximum per block: 2 + 2/64 bytes for each number."""

    temporaries = 16

    def __init__(self, pages: _Pages, count: int):
        self.pages, self.maxima = pages, 2 * count

    @staticmethod
    def size(count: int) -> int:
        return 2 * count + 2 * 4 * -(-count // BLOCK)

    def at(self, begin: int, end: int) -> _Chunk:
        return _Chunk(self, begin, end)

    def load(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        m, v = (
            _expand(codes, absmax, table)
            for (codes, absmax), table in zip(self._views(begin, end), (signed(), unsigned()), strict=True)
        )
        return m, v

    def store(self, begin: int, end: int, m: Tensor, v: Tensor) -> None:
        for x, (codes, absmax), table in zip((m, v), self._views(begin, end), (signed(), unsigned()), strict=True):
            _compress(x, codes, absmax, table)
        self.pages.release(self.maxima + 8 * -(-end // BLOCK))

    def _views(self, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        n, first = end - begin, begin // BLOCK
        blocks = -(-n // BLOCK)
        for i in range(2):
            codes = self.pages.view(2 * begin + i * n, n, torch.uint8)
            yield codes, self.pages.view(self.maxima + 8 * first + 4 * i * blocks, blocks, torch.float32)


class _Chunk:
    """``with`` gives both moments of a piece to change; leaving writes them back."""

    def __init__(self, moments: Any, begin: int, end: int):
        self.moments, self.range = moments, (begin, end)

    def __enter__(self) -> tuple[Tensor, Tensor]:
        self.held: tuple[Tensor, Tensor] = self.moments.load(*self.range)
        return self.held

    def __exit__(self, *exc: object) -> None:
        m, v = self.held
        del self.held
        self.moments.store(*self.range, m, v)


@lru_cache
def signed() -> Codebook:
    """The dynamic map of 256 values from -1 to 1."""
    return Codebook.of(dynamic())


@lru_cache
def unsigned() -> Codebook:
    """The dynamic map without sign: decades 1e-6 to 1, the i-th with ``2^(i+1)`` values; 0 and 1."""
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + 1) + 1)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
    return Codebook.of(torch.cat([torch.tensor([0.0]), *decades, torch.tensor([1.0])]))


def _expand(codes: Tensor, absmax: Tensor, table: Codebook) -> Tensor:
    return table.lookup(codes) * absmax.repeat_interleave(BLOCK)[: len(codes)]


def _compress(x: Tensor, codes: Tensor, absmax: Tensor, table: Codebook) -> None:
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    absmax.copy_(blocks.abs().amax(1))
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    found = table.nearest(scaled)
    if table is unsigned():
        # A second moment of zero beside a first that is not would make the step explode: the least code stands for it.
        found = found.clamp_(min=1).where(scaled > 0, found)
    codes.copy_(found.view(-1)[: len(x)])


def _kept(memory: int | None, working: int) -> int | None:
    """Bytes of pages that stay, so that with the ``working`` bytes of a chunk in use ``memory`` is not exceeded."""
    if memory is None:
        return None
    if memory < working:
        raise RequestError(f"--optimizer-memory {memory} is less than a chunk in use takes; give at least {working}")
    return (memory - working) // PAGE * PAGE
