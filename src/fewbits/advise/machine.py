"""How fast this machine is at what a run does: measured in a second or two, on random numbers.

A solver's time for a weight ``[out, in]`` is taken as ``fixed(in) + out * row(in)``, both powers of ``in`` through two
measured sizes: a sweep's factorisation grows with ``in**3``, its rows with ``in**2``, rounding to nearest with ``in``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fewbits.pipeline.precision import PRECISIONS
from fewbits.plan import Recipe
from fewbits.stats import Stats

_SIZES = (512, 1024)
_ROWS = (64, 256)
TOKENS = 1024


@dataclass(frozen=True)
class Power:
    """``seconds = factor * n ** exponent``, through two measurements."""

    factor: float
    exponent: float

    @classmethod
    def through(cls, a: tuple[int, float], b: tuple[int, float], lowest: float, highest: float) -> Power:
        """The exponent is kept within bounds: short measurements are noisy."""
        (n, s), (m, t) = a, b
        exponent = math.log(max(t, 1e-9) / max(s, 1e-9)) / math.log(m / n)
        exponent = min(max(exponent, lowest), highest)
        return cls(max(t, 1e-9) / m**exponent, exponent)

    def __call__(self, n: int) -> float:
        return float(self.factor * n**self.exponent)


@dataclass(frozen=True)
class Law:
    """Seconds for a weight ``[out, in]``."""

    fixed: Power
    row: Power

    def __call__(self, out: int, columns: int) -> float:
        return self.fixed(columns) + out * self.row(columns)


@dataclass(frozen=True)
class Machine:
    """Floating-point operations per second of the forward passes and of gram matrices; bytes per second of a copy."""

    products: float
    grams: float
    copies: float

    @classmethod
    def measure(cls, compute: str) -> Machine:
        """``compute`` as in a plan."""
        precision, n = PRECISIONS[compute], _SIZES[1]
        x, w, gram = torch.randn(TOKENS, n), torch.randn(n, n), torch.zeros(n, n)
        source = torch.zeros(1 << 24)
        with precision.context():
            product = best(lambda: torch.nn.functional.linear(x, w))
        observed = x.to(precision.observed)
        return cls(
            2 * TOKENS * n * n / product,
            TOKENS * n * n / best(lambda: precision.sums.gram_(gram, observed)),
            source.nbytes / best(source.clone),
        )


def best(work: Callable[[], object], times: int = 3) -> float:
    """The least of a few measurements in seconds: what disturbs one only makes it longer."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)


def solving(recipe: Recipe) -> Law:
    """How long the solver of a recipe takes on its grid."""
    return law(lambda w, stats: recipe.solver(w, recipe.grid, stats), bool(recipe.solver.needs))


def transforming(transform: Any, recipe: Recipe) -> Law:
    """How long a transform takes to be fitted at a site with that many rows."""
    return law(lambda w, stats: transform.fit([(w, stats)], recipe.grid, torch.arange(w.shape[1])), True)


def law(work: Callable[[torch.Tensor, Stats | None], object], calibrated: bool) -> Law:
    """Measures ``work(w, stats)`` at two numbers of rows and two of columns."""
    rows: list[tuple[int, float]] = []
    fixed: list[tuple[int, float]] = []
    for columns in _SIZES:
        generator = torch.Generator().manual_seed(columns)
        stats = None
        if calibrated:
            stats = Stats.empty(columns, frozenset({"gram", "abs"}))
            stats.update(torch.randn(2 * columns, columns, generator=generator))
        few, many = (torch.randn(n, columns, generator=generator) * 0.02 for n in _ROWS)
        work(few, stats)
        short, long = best(lambda w=few, s=stats: work(w, s), 2), best(lambda w=many, s=stats: work(w, s), 2)  # type: ignore[misc]
        per_row = max(long - short, long * 0.1) / (_ROWS[1] - _ROWS[0])
        rows.append((columns, per_row))
        fixed.append((columns, max(short - _ROWS[0] * per_row, short * 0.01)))
    row = Power.through(rows[0], rows[1], 0.9, 2.0 if calibrated else 1.1)
    return Law(Power.through(fixed[0], fixed[1], 0.0, 3.0 if calibrated else 1.0), row)
