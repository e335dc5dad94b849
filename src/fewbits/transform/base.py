"""What a transform is: a function-preserving reparametrisation of the channels between a producer and its consumers.

``y = W x = (W A⁻ᵀ)(Aᵀ… x)``: here only diagonal maps, ``x → x / s`` with every consumer's columns multiplied by
``s``. The producer (a norm or a linear layer) absorbs the division, so nothing remains to be done at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fewbits.grids import Grid
from fewbits.stats import Stats


@dataclass(frozen=True)
class Diagonal:
    """The map ``x → x / s``; ``s [channels]`` float32, positive."""

    s: Tensor

    def consumer(self, w: Tensor) -> Tensor:
        """``W diag(s)`` for a consumer ``w [out, channels]``."""
        return w * self.s

    def producer(self, v: Tensor) -> Tensor:
        """``diag(1/s) V`` for a producer ``v [channels, ...]``."""
        return v / self.s.reshape(-1, *[1] * (v.dim() - 1))

    def stats(self, stats: Stats) -> Stats:
        """Statistics of ``x / s``: no second forward pass."""
        return stats.scaled(1 / self.s)


class Transform(Protocol):
    """Chooses a map for one site: consumers that read the same activation."""

    @property
    def needs(self) -> frozenset[str]: ...

    def takes(self, kind: str) -> bool:
        """Whether it works at sites whose producer is of ``kind``: "norm", "norm+1" or "linear"."""
        ...

    def fit(self, consumers: Sequence[tuple[Tensor, Stats]], grid: Grid, share: Tensor | None = None) -> Diagonal:
        """The map for ``consumers``: each weight ``[out_i, columns]`` with the statistics of its input.

        Columns with equal ``share [columns]`` (int64) belong to one channel of the producer and get one factor; the
        map has one entry per consumer column.
        """
        ...
