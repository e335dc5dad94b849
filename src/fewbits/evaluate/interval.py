"""95 % intervals for averages over correlated tokens: a block bootstrap.

The losses of neighbouring tokens are correlated, so treating every token as an independent draw gives intervals that
are too narrow. Each window is cut into runs of ``BLOCK`` consecutive predictions (fewer when that would leave under
``LEAST`` blocks), and whole runs are drawn with replacement; the 2.5 % and 97.5 % quantiles of the statistic over the
draws are the interval (percentile bootstrap; Künsch, "The jackknife and the bootstrap for general stationary
observations", 1989, with non-overlapping blocks). It covers which passages of this text happened to be drawn, not the
choice of the text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
LEAST = 20
DRAWS = 1000
Floats = NDArray[np.float64]


def blocks(windows: int, per_window: int) -> NDArray[np.int64]:
    """int64 ``[windows * per_window]``: the block of each prediction; blocks do not cross windows."""
    length = max(1, min(BLOCK, per_window, windows * per_window // LEAST))
    runs = -(-per_window // length)
    within = np.arange(per_window) // length
    return (np.arange(windows)[:, None] * runs + within[None, :]).reshape(-1)


def draws(block: NDArray[np.int64], seed: int = 0) -> Floats:
    """float64 ``[DRAWS, blocks]``: how many times each draw holds each block."""
    count = int(block[-1]) + 1
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)


def mean_interval(values: Floats, block: NDArray[np.int64]) -> tuple[float, float]:
    """95 % interval of the mean of ``values [tokens]``."""
    times = draws(block)
    sums, sizes = np.bincount(block, weights=values), np.bincount(block).astype(np.float64)
    return _middle((times @ sums) / (times @ sizes))


def quantile_interval(values: Floats, block: NDArray[np.int64], q: float) -> tuple[float, float]:
    """95 % interval of the ``q`` quantile of ``values [tokens]``."""
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], block[order]
    found = np.empty(DRAWS)
    for i, times in enumerate(draws(block)):
        below = np.cumsum(times[owner])
        found[i] = ordered[min(int(np.searchsorted(below, q * below[-1])), len(ordered) - 1)]
    return _middle(found)


def _middle(found: Floats) -> tuple[float, float]:
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
