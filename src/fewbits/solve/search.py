"""Codes and parameters found together by the grid's own search, as the reference quantizers of GGUF do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Grid
from fewbits.split import Split
from fewbits.stats import Stats
from fewbits.tensor import Quantized


@dataclass(frozen=True)
class Search:
    """``grid.search``; with ``importance`` each column weighs as much as the mean square of its input.

    That is llama.cpp's importance matrix. Inputs that calibration never saw weigh as much as the weakest that it saw.
    """

    importance: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"}) if self.importance else frozenset()

    def __call__(self, w: Tensor, grid: Grid, stats: Stats | None, split: Split | None = None) -> Quantized:
        """Quantize ``w [out, in]`` on ``grid``. Raises RequestError for a grid without a search of its own."""
        if not hasattr(grid, "search"):
            raise RequestError(f"the grid {type(grid).__name__} has no search; take the solver nearest")
        codes, params = grid.search(w, mean_square(stats) if self.importance and stats else None)
        return Quantized(grid, codes, params)


def mean_square(stats: Stats) -> Tensor:
    """Mean square of each input, float32 ``[in]``, never zero."""
    found = stats.gram.diagonal() / max(stats.count, 1)
    seen = found[found > 0]
    return found.clamp(min=float(seen.min()) if len(seen) else 1.0)
