"""What stays off the grid: which single weights are kept beside the codes, in 16 bits (``tensor.Sparse``).

A split is frozen data; the solver carries it out, because what is kept is the difference from the code that it chose.
:class:`Largest` knows its weights beforehand (SqueezeLLM, arXiv 2306.07629, section 4.2); :class:`Outliers` are found
while rounding: those whose rounding would cost most (SpQR, arXiv 2306.03078, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewbits.errors import RequestError


class Split(Protocol):
    """A rule for single weights."""

    def known(self, w: Tensor, importance: Tensor | None) -> Tensor | None:
        """bool ``[out, in]``: weights of ``w [out, in]`` that are kept whatever the solver does; None leaves it to the
        solver. ``importance`` of that shape says what an error of each weight costs.
        """
        ...


@dataclass(frozen=True)
class Outliers:
    """Weights whose squared rounding error, weighted as the sweep weighs it (``e²``), exceeds ``threshold`` times the
    mean over columns of the weights' variance, weighted so too. ``most`` is the largest share kept in a group of
    columns: calibration on few tokens would keep too many.
    """

    threshold: float = 0.2
    most: float = 0.05

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or not 0 < self.most <= 1:
            raise RequestError(
                f"outliers above {self.threshold}, at most {self.most}; give a threshold of 0 or more, a share up to 1"
            )

    def known(self, w: Tensor, importance: Tensor | None) -> Tensor | None:
        return None

    def limit(self, w: Tensor, pivots: Tensor, live: Tensor) -> float:
        """The ``e²`` above which a weight is kept; ``pivots [in]`` are the factor's diagonal, ``live [in]`` bool."""
        spread = (w.var(0, unbiased=False) / pivots.square())[live]
        return self.threshold * float(spread.mean()) if len(spread) else math.inf


@dataclass(frozen=True)
class Largest:
    """The share ``sensitive`` of weights whose errors cost most, and then the share ``magnitude`` of the largest."""

    magnitude: float = 0.004
    sensitive: float = 0.0005

    def __post_init__(self) -> None:
        if min(self.magnitude, self.sensitive) < 0 or not self.magnitude + self.sensitive < 1:
            raise RequestError(
                f"shares {self.magnitude} and {self.sensitive} of the weights given; allowed: 0 or more, below 1 in all"
            )

    def known(self, w: Tensor, importance: Tensor | None) -> Tensor | None:
        mask = torch.zeros(w.shape, dtype=torch.bool, device=w.device)
        if self.sensitive:
            if importance is None:
                raise RequestError("a share of sensitive weights needs their importance; give sensitive: 0")
            mask.view(-1)[_top(importance.expand(w.shape), self.sensitive)] = True
        if self.magnitude:
            mask.view(-1)[_top(w.abs().masked_fill(mask, -1), self.magnitude)] = True
        return mask


def _top(score: Tensor, share: float) -> Tensor:
    """Indices of exactly ``ceil(share * n)`` highest scores: by index, so that ties do not count twice."""
    flat = score.reshape(-1)
    return flat.topk(math.ceil(share * flat.numel())).indices
