"""A quantized weight: the only thing that a solver returns and a layout packs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fewbits.activations import Inputs
from fewbits.grids import Grid, Params


class Residual(Protocol):
    """The part of a weight that stays off the grid (columns, sparse, low rank); added to the decoded codes."""

    def dense(self) -> Tensor: ...

    def cost(self) -> float:
        """Bits that it takes in all."""
        ...


@dataclass(frozen=True, eq=False)
class Sparse:
    """Single weights beside the codes, by rows (CSR), of a weight ``(out, in)`` with at most 65536 columns.

    ``offsets`` int32 ``[out + 1]``: row ``r`` has the entries ``offsets[r] .. offsets[r + 1] - 1``; ``columns`` int32
    ``[entries]``, rising within a row; ``values`` float16 ``[entries]``: what is *added* to the decoded codes there.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    ENTRY: ClassVar[int] = 32  # bits: a float16 and a 16-bit column
    OFFSET: ClassVar[int] = 32  # bits: where a row begins
    WIDEST: ClassVar[int] = 1 << 16

    @classmethod
    def of(cls, w: Tensor) -> Sparse | None:
        """The entries of ``w [out, in]`` that are not zero once rounded to float16; None when there are none."""
        half = w.to(torch.float16)
        where = half.nonzero()
        if not len(where):
            return None
        offsets = torch.zeros(len(w) + 1, dtype=torch.int32, device=w.device)
        offsets[1:] = torch.bincount(where[:, 0], minlength=len(w)).cumsum(0)
        shape = (int(w.shape[0]), int(w.shape[1]))
        return cls(offsets, where[:, 1].int(), half[where[:, 0], where[:, 1]], shape)

    def dense(self) -> Tensor:
        """float32 ``[out, in]``."""
        return self.rows(0, self.shape[0])

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end``, float32."""
        offsets = self.offsets[begin : end + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        found = torch.zeros(end - begin, self.shape[1], device=self.values.device)
        place = torch.repeat_interleave(offsets.diff().long()), self.columns[entries].long()
        found[place] = self.values[entries].float()
        return found

    def cost(self) -> float:
        """Bits in all."""
        return float(self.ENTRY * len(self.values) + self.OFFSET * len(self.offsets))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(t.numel() * t.element_size() for t in (self.offsets, self.columns, self.values))

    def to(self, device: torch.device | str) -> Sparse:
        return Sparse(self.offsets.to(device), self.columns.to(device), self.values.to(device), self.shape)


@dataclass(frozen=True)
class Quantized:
    """Codes on a grid, their parameters, what stays off the grid, and how the layer's ``inputs`` are quantized, if so.

    The following hold:
      * ``codes.shape == (out, in)`` for scalar grids
      * ``dense() == grid.decode(codes, params) + residual.dense()``, float32 ``[out, in]``
      * ``params == grid.settle(params)`` for grids that quantize their parameters once the codes are chosen

    ``pruned``: many weights are zero on purpose, and where the others are is stored, and these alone.
    """

    grid: Grid
    codes: Tensor
    params: Params
    residual: Residual | None = None
    meta: Mapping[str, float] = field(default_factory=dict, compare=False)
    inputs: Inputs | None = field(default=None, compare=False)
    pruned: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        settle = getattr(self.grid, "settle", None)
        if settle is not None:
            object.__setattr__(self, "params", settle(self.params))

    def dense(self) -> Tensor:
        """The weight that this stands for, float32 ``[out, in]``."""
        w = self.grid.decode(self.codes, self.params)
        return w if self.residual is None else w + self.residual.dense()

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return int(self.codes.shape[0]), int(self.codes.shape[1]) * self.grid.width

    def zeros(self) -> Tensor:
        """bool ``[out, in]``: the weights whose code is that of zero."""
        code = self.grid.encode(torch.zeros(self.shape, device=self.codes.device), self.params)
        return (self.codes == code) & (self.grid.decode(code, self.params) == 0)

    def bits_per_weight(self) -> float:
        """Every parameter counted, the residual and ``g_idx`` too; of pruned weights those left and a bit for each."""
        out, columns = self.shape
        extra: float = 32 * columns if "g_idx" in self.params else 0
        if self.pruned:
            grid: Any = self.grid
            extra -= max(0.0, float(self.zeros().sum()) * grid.bits - out * columns)
        extra += 0 if self.residual is None else self.residual.cost()
        return self.grid.cost(self.shape) + extra / (out * columns)
