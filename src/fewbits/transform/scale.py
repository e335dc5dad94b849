"""AWQ: scale the channels that carry large activations before rounding (arXiv 2306.00978, section 3.2).

``Q(W diag(s)) diag(1/s)`` rounds the columns with large ``s`` finely. The search goes over ``s = a^r / b^(1-r)`` with
``a`` the mean absolute activation and ``b`` the mean relative weight (or 1), normalised so that ``max(s) min(s) =
1``. The loss of a candidate is ``Σ tr(E G Eᵀ)`` over the consumers: the squared error of their outputs, from the gram
matrix alone, so no activations are kept and no forward pass is run. ``r = 0`` without ``b`` is the identity, hence
the chosen loss never exceeds plain rounding's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.grids import Grid
from fewbits.stats import Stats, loss
from fewbits.transform.base import Diagonal


@dataclass(frozen=True)
class Awq:
    """AWQ's scale search: ``steps`` exponents from 0 to 1 inclusive, each with and (``duo``) without the weights' part.

    Candidates are compared on at most ``rows`` rows of the consumers, evenly spaced; the best of them must then beat
    the identity on all rows.
    """

    steps: int = 11
    duo: bool = True
    rows: int = 1024

    needs = frozenset({"gram", "abs"})

    def takes(self, kind: str) -> bool:
        return True

    def fit(self, consumers: Sequence[tuple[Tensor, Stats]], grid: Grid, share: Tensor | None = None) -> Diagonal:
        """The candidate with the least output error under round-to-nearest on ``grid``; see :class:`Transform`."""
        parts = by_stats(consumers)
        w = torch.cat([w for w, _ in parts])
        tokens = max(1, sum(s.count for _, s in parts))
        absmean = sum((s.absmean * (s.count / tokens) for _, s in parts), torch.zeros(w.shape[1]))
        few = [(part[:: -(-len(w) // self.rows)], stats) for part, stats in parts]
        trials = [(output_error(few, grid, s), s) for s in self.candidates(w, absmean, grid.period, share)]
        best, identity = min(trials, key=lambda t: t[0])[1], trials[0][1]
        better = output_error(parts, grid, best) < output_error(parts, grid, identity)
        return Diagonal(best if better else identity)

    def candidates(self, w: Tensor, absmean: Tensor, group: int, share: Tensor | None) -> Iterator[Tensor]:
        """Normalised scales, one per consumer column (equal where shared), the identity first."""
        a = tied(absmean, share).clamp(min=1e-8)
        b = tied(relative_weight(w, group), share).clamp(min=1e-8)
        for family in (torch.ones_like(b), b) if self.duo else (torch.ones_like(b),):
            for i in range(self.steps):
                r = i / (self.steps - 1)
                s = (a**r / family ** (1 - r)).clamp(min=1e-4)
                yield s / (s.max() * s.min()).sqrt()


def output_error(parts: Sequence[tuple[Tensor, Stats]], grid: Grid, s: Tensor) -> float:
    """Squared error of the consumers' outputs when their weights are scaled by ``s`` and rounded to nearest."""
    total = 0.0
    for w, stats in parts:
        scaled = w * s
        params = grid.fit(scaled)
        total += float(loss(grid.decode(grid.encode(scaled, params), params).div_(s).sub_(w), stats.gram))
    return total


def by_stats(consumers: Sequence[tuple[Tensor, Stats]]) -> list[tuple[Tensor, Stats]]:
    """Consumers of the very same activation become one tall matrix: one product instead of several."""
    grouped: dict[int, tuple[list[Tensor], Stats]] = {}
    for w, stats in consumers:
        grouped.setdefault(id(stats), ([], stats))[0].append(w.float())
    return [(torch.cat(ws), stats) for ws, stats in grouped.values()]


def relative_weight(w: Tensor, group: int) -> Tensor:
    """Mean over rows of ``|w|`` relative to the largest of its group, ``[channels]`` in 0..1 (AWQ's ``w_mean``)."""
    columns = w.shape[1]
    size = columns if group == -1 else group
    parts = [p.abs() / (p.abs().amax(1, keepdim=True) + 1e-6) for p in w.split(size, 1)]
    return torch.cat([p.mean(0) for p in parts])


def tied(x: Tensor, share: Tensor | None) -> Tensor:
    """Average of ``x`` over the channels that must get one factor."""
    if share is None:
        return x
    n = int(share.max()) + 1
    total = torch.zeros(n).index_add_(0, share, x)
    return (total / torch.bincount(share, minlength=n).clamp(min=1))[share]
