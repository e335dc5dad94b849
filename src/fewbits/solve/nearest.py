"""Round to nearest: fit the grid to the weights, take the nearest codes. No calibration is read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewbits.grids import Grid
from fewbits.split import Split
from fewbits.stats import Stats
from fewbits.tensor import Quantized


@dataclass(frozen=True)
class Nearest:
    """RTN; with ``importance`` the grid's search weighs each column by its activation energy (diagonal of the gram)."""

    importance: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"}) if self.importance else frozenset()

    def __call__(self, w: Tensor, grid: Grid, stats: Stats | None, split: Split | None = None) -> Quantized:
        """Quantize ``w [out, in]`` on ``grid``."""
        params = grid.fit(w, stats.gram.diagonal() if self.importance and stats else None)
        return Quantized(grid, grid.encode(w, params), params)
