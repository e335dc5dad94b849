"""A quantized weight: the only thing that a solver returns and a layout packs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fewbits.activations import Inputs
from fewbits.grids import Grid, Params


class Residual(Protocol):
    """The part of a weight that stays off the grid (columns, sparse, low rank); added to the decoded codes."""

    def dense(self) -> Tensor: ...

    def cost(self) -> float:
        """Bits that it takes in all."""
        ...


@dataclass(frozen=True)
class Quantized:
    """Codes on a grid, their parameters, what stays off the grid, and how the layer's ``inputs`` are quantized, if so.

    The following hold:
      * ``codes.shape == (out, in)`` for scalar grids
      * ``dense() == grid.decode(codes, params) + residual.dense()``, float32 ``[out, in]``
      * ``params == grid.settle(params)`` for grids that quantize their parameters once the codes are chosen
    """

    grid: Grid
    codes: Tensor
    params: Params
    residual: Residual | None = None
    meta: Mapping[str, float] = field(default_factory=dict, compare=False)
    inputs: Inputs | None = field(default=None, compare=False)

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

    def bits_per_weight(self) -> float:
        """Every parameter counted, the residual and ``g_idx`` too."""
        out, columns = self.shape
        extra: float = 32 * columns if "g_idx" in self.params else 0
        extra += 0 if self.residual is None else self.residual.cost()
        return self.grid.cost(self.shape) + extra / (out * columns)
