"""Tile sizes: a handful of candidates for each number of rows, the fastest of which is found at first use.

Candidates of one list share ``k``, the order of summation, so the choice changes the time and not the result.
``FEWBITS_TUNE=0`` takes the first candidate without measuring, as the interpreter and CUDA graph captures do.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewbits.kernels.triton import processors


@dataclass(frozen=True)
class Tiles:
    """Rows of x, rows of the weight and columns of one program; its warps and software pipeline stages."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3


_FEW = (Tiles(1, 8, 256), Tiles(1, 4, 256), Tiles(1, 16, 256, 8))
FEW = {1: _FEW, 2: _FEW, 4: (Tiles(4, 4, 256), Tiles(4, 2, 256), Tiles(4, 8, 256, 8))}
"""By the number of rows, a power of two."""
MANY = {
    16: (Tiles(16, 64, 64), Tiles(16, 32, 64), Tiles(16, 128, 64, 4, 4)),
    32: (Tiles(32, 64, 64), Tiles(32, 128, 64, 4, 4), Tiles(32, 128, 64, 8)),
    64: (Tiles(64, 64, 64), Tiles(64, 128, 64), Tiles(64, 128, 64, 8)),
    128: (Tiles(128, 128, 64, 8), Tiles(64, 128, 64), Tiles(128, 64, 64)),
}
"""By the number of rows, rounded up to a power of two between 16 and 128."""
ROUNDS = 5
_chosen: dict[Hashable, Tiles] = {}


def height(rows: int) -> int:
    """The list of :data:`MANY` for ``rows``."""
    return min(max(16, 1 << (rows - 1).bit_length()), 128)


def split(rows: int, out: int, columns: int, device: torch.device) -> int:
    """Into how many parts to cut the columns: a power of two, at most 8, that fills the GPU twice."""
    tiles = -(-out // 64) * -(-rows // min(height(rows), 64))
    parts = 1
    while parts < 8 and parts * tiles < processors(device) and columns // (2 * parts) >= 512:
        parts *= 2
    return parts


def join(parts: Tensor, bias: Tensor | None) -> Tensor:
    """Sum of parts ``[split, rows, out]``, plus bias; of the parts' dtype."""
    total = parts.sum(0, dtype=parts.dtype)
    return total if bias is None else total + bias.float()


def run(
    key: Hashable, candidates: Sequence[Tiles], launch: Callable[[Tiles], None], x: Tensor, given: Tiles | None
) -> None:
    """Launch with ``given``, or with what is fastest for ``key``, measured now if it is not known."""
    if given is None and key not in _chosen and _measurable(x.device):
        _chosen[key] = fastest(candidates, launch, seconds)
    launch(given or _chosen.get(key, candidates[0]))


def fastest(
    candidates: Sequence[Tiles], launch: Callable[[Tiles], None], time: Callable[[Callable[[], None]], float]
) -> Tiles:
    """The candidate with the smallest ``time``, the first of equals; those that do not fit the device are skipped."""
    best, least = candidates[0], float("inf")
    for tiles in candidates:
        try:
            took = time(partial(launch, tiles))
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            continue
        if took < least:
            best, least = tiles, took
    return best


def seconds(f: Callable[[], None]) -> float:
    """Median time of ``f`` on the GPU, after one call that compiles it."""
    f()
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _measurable(device: torch.device) -> bool:
    wanted = device.type == "cuda" and os.environ.get("FEWBITS_TUNE", "1") != "0"
    return wanted and not torch.cuda.is_current_stream_capturing()
