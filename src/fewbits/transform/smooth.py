"""SmoothQuant: move the outliers of activation channels into the weights (arXiv 2211.10438, eq. 4).

``s_j = max|X_j|^alpha / max|W_j|^(1-alpha)`` for each channel ``j``, the weights' maximum over all consumers of the
activation. After ``x / s`` and ``W diag(s)`` both maxima lie between the two old ones: at ``alpha = 0.5`` they are
equal, at 1 the activations are flat, at 0 the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Grid
from fewbits.stats import Stats
from fewbits.transform.base import Diagonal

FLOOR = 1e-5
LOW, HIGH = 1e-3, 1e3
"""A folded norm must stay inside float16: the paper's own floor of 1e-5 for ``s`` makes weights of 1e5."""


@dataclass(frozen=True)
class Smooth:
    """``alpha`` None searches 0.3, 0.35 .. 0.95 at each site for the least output error, see :func:`expected_error`.

    ``sites``: "norm" smooths what a norm feeds (the paper), "all" every legal site (v to o, up to down).
    """

    alpha: float | None = 0.5
    sites: str = "norm"

    needs = frozenset({"gram", "abs"})

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise RequestError(f"alpha {self.alpha} is not possible; give 0 to 1, or null to search it at each site")
        if self.sites not in ("norm", "all"):
            raise RequestError(f"sites {self.sites!r} are unknown; allowed: norm, all")

    def takes(self, kind: str) -> bool:
        return self.sites == "all" or kind.startswith("norm")

    def fit(self, consumers: Sequence[tuple[Tensor, Stats]], grid: Grid, share: Tensor | None = None) -> Diagonal:
        """The map for one site; see :class:`fewbits.transform.Transform`."""
        x, w = maxima(consumers, share)
        if self.alpha is not None:
            return Diagonal(scales(x, w, self.alpha))
        tried = [scales(x, w, a / 100) for a in range(30, 100, 5)]
        return Diagonal(min(tried, key=lambda s: expected_error(consumers, s, grid.levels)))


def maxima(consumers: Sequence[tuple[Tensor, Stats]], share: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each channel of the activations and of the weights, float32 ``[columns]``, over all
    consumers and over channels that share a factor.
    """
    x = torch.stack([absmax_of(s) for _, s in consumers]).amax(0)
    w = torch.stack([w.float().abs().amax(0) for w, _ in consumers]).amax(0)
    return _shared_max(x, share), _shared_max(w, share)


def scales(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """``s`` from the two maxima, both at least 1e-5; channels that no token used keep 1."""
    s = x.clamp(min=FLOOR) ** alpha / w.clamp(min=FLOOR) ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), s, 1.0).clamp(LOW, HIGH)


def expected_error(consumers: Sequence[tuple[Tensor, Stats]], s: Tensor, levels: int) -> float:
    """Squared output error that rounding ``x / s`` to 8 bits per tensor and ``W diag(s)`` to ``levels`` per row would
    make, each error taken as uniform in its step (step²/12) and independent.

    The activations' part is ``tokens * step_x² |W s|²``, the weights' ``Σ step_w² Σ_j G_jj / s_j²``: the maxima and the
    gram's diagonal are enough.
    """
    total = 0.0
    for w, stats in consumers:
        scaled = w.float() * s
        step_x = float((absmax_of(stats) / s).max()) / 127
        step_w = scaled.abs().amax(1) * (2 / (levels - 1))
        energy = float((stats.gram.diagonal() / s.square()).sum())
        total += stats.count * step_x**2 * float(scaled.square().sum(1).sum()) + float(step_w.square().sum()) * energy
    return total


def absmax_of(stats: Stats) -> Tensor:
    """The largest magnitude of each channel. Raises RequestError when magnitudes were not gathered."""
    if stats.absmax is None:
        raise RequestError("these statistics hold no magnitudes; gather them with needs={'gram', 'abs'}")
    return stats.absmax


def _shared_max(x: Tensor, share: Tensor | None) -> Tensor:
    if share is None:
        return x
    n = int(share.max()) + 1
    return torch.zeros(n).scatter_reduce_(0, share, x, "amax")[share]
