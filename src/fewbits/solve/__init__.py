"""Solvers: pure functions that choose the code of each weight."""

from typing import Protocol

from torch import Tensor

from fewbits.grids import Grid
from fewbits.solve.descent import Descent
from fewbits.solve.exact import Exact
from fewbits.solve.nearest import Nearest
from fewbits.solve.search import Search
from fewbits.solve.sensitive import Sensitive
from fewbits.solve.surgeon import Surgeon
from fewbits.solve.sweep import Sweep
from fewbits.split import Split
from fewbits.stats import Stats
from fewbits.tensor import Quantized


class Solver(Protocol):
    """``(weight, grid, statistics, split) -> Quantized``; never sees a module, a file, a device name or a log."""

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that it reads."""
        ...

    def __call__(self, w: Tensor, grid: Grid, stats: Stats | None, split: Split | None = None) -> Quantized:
        """``stats`` may be None only for a solver that needs nothing; ``split`` only given where it has ``splits``."""
        ...


__all__ = ["Descent", "Exact", "Nearest", "Search", "Sensitive", "Solver", "Surgeon", "Sweep"]
