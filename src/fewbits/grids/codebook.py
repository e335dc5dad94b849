"""Fixed tables of numbers in -1..1, and the rule that finds the nearest: each as a derivation.

A table is a function without arguments that gives its values by code; a new one is a line in ``CODEBOOKS``. They need
not be sorted. ``x`` becomes the number of thresholds below it, thresholds being the float32 midpoints of neighbours: a
tie goes to the lower value (bitsandbytes, ``quantize_4bit``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codebook:
    """``values [n]`` float32 by code; ``order [n]`` uint8: codes by rising value; ``thresholds [n - 1]`` float32."""

    values: Tensor
    order: Tensor
    thresholds: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Codebook:
        rank = torch.argsort(values, stable=True)
        ordered = values[rank]
        return cls(values, rank.to(torch.uint8), (ordered[1:] + ordered[:-1]) / 2)

    def nearest(self, x: Tensor) -> Tensor:
        """Codes of ``x``, uint8 of its shape."""
        rank = torch.bucketize(x, self.thresholds.to(x.device, x.dtype), out_int32=True)
        return self.order.to(x.device)[rank]

    def lookup(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of ``codes``, of their shape."""
        return self.values.to(codes.device, dtype)[codes.int()]


def normal_float() -> Tensor:
    """NF4's derivation in float64 (arXiv 2305.14314, section 3 and appendix E): quantiles of the normal distribution
    at equal steps, 8 of them above zero and 7 below, and zero itself, divided by the largest.

    The outermost quantile lies half-way between those of 1/32 and 1/30.
    """
    outermost = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    inverse = NormalDist().inv_cdf

    def half(steps: int) -> list[float]:
        return [inverse(outermost + (0.5 - outermost) * i / steps) for i in range(steps)]

    values = [-v for v in half(7)] + [0.0] + half(8)[::-1]
    return torch.tensor(values, dtype=torch.float64) / max(values)


def nf4() -> Tensor:
    """NF4 with the constants that every checkpoint is made for."""
    lines = resources.files("fewbits.grids").joinpath("nf4.txt").read_text().splitlines()
    return torch.tensor([float(line) for line in lines if not line.startswith("#")])


def fp4() -> Tensor:
    """bitsandbytes' FP4, which is not OCP's E2M1: sign, then exponent ``e`` of 2 bits, then mantissa ``m``.

    ``(1 + m/2) 2^(4-e)`` for ``e`` = 1, 2, 3 and ``m/16`` for ``e`` = 0, divided by the largest, 12. Code 8 is a second
    zero, of positive sign in the table.
    """
    magnitude = [m / 16 if e == 0 else (1 + m / 2) * 2.0 ** (4 - e) for e in range(4) for m in range(2)]
    return torch.tensor(magnitude + [0 - v for v in magnitude]) / 12


def dynamic() -> Tensor:
    """The signed dynamic map of 8 bits (arXiv 1511.04561): decades 1e-6 to 1, the i-th with ``2^i`` values, of both
    signs; 0 and 1.

    The values of a decade are the middles of equal parts of its 0.1 to 1. The largest negative value is -0.993.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    return torch.cat([-positive, torch.tensor([0.0]), positive, torch.tensor([1.0])]).sort().values


CODEBOOKS: dict[str, Callable[[], Tensor]] = {"nf4": nf4, "fp4": fp4}


@lru_cache
def codebook(name: str) -> Codebook:
    """The codebook of that name; KeyError when there is none."""
    return Codebook.of(CODEBOOKS[name]())
