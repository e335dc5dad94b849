"""What calibration leaves of a layer's inputs: a commutative monoid over batches.

With inputs ``x_t [in]`` the gram matrix is ``G = Σ_t x_t x_tᵀ`` (sheet letters: ``H = 2G``; the factor changes no
choice). Adding is exact in any order up to float32 rounding; within a run batches are added in one fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits import kernels


@dataclass
class Stats:
    """Sums over ``count`` tokens: ``gram [in, in]`` float32, ``abssum [in]`` float32, ``absmax [in]`` float32."""

    gram: Tensor
    abssum: Tensor
    absmax: Tensor
    count: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device | str = "cpu") -> Stats:
        def zero(*n: int) -> Tensor:
            return torch.zeros(*n, device=device)

        return cls(zero(columns, columns), zero(columns), zero(columns))

    def update(self, x: Tensor) -> None:
        """Add a batch ``x [..., in]``, in place. bfloat16 inputs are multiplied exactly and summed in float32."""
        x = x.reshape(-1, x.shape[-1])
        kernels.gram_(self.gram, x)
        a = x.abs()
        self.abssum += a.sum(0, dtype=torch.float32)
        self.absmax = torch.maximum(self.absmax, a.amax(0).float()) if len(x) else self.absmax
        self.count += len(x)

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.gram + other.gram,
            self.abssum + other.abssum,
            torch.maximum(self.absmax, other.absmax),
            self.count + other.count,
        )

    @property
    def absmean(self) -> Tensor:
        """Mean absolute value per channel, float32 ``[in]``."""
        return self.abssum / max(self.count, 1)

    def finite(self) -> bool:
        """Whether every sum is finite."""
        return bool(torch.isfinite(self.gram.diagonal()).all())

    def scaled(self, s: Tensor) -> Stats:
        """The statistics of ``x * s``: what a diagonal map does to them without a second forward pass."""
        a = s.abs()
        return Stats(self.gram * s[:, None] * s, self.abssum * a, self.absmax * a, self.count)


def loss(error: Tensor, gram: Tensor) -> Tensor:
    """``tr(E G Eᵀ)`` for an error ``E [out, in]`` of the weights: the squared error of the layer's output."""
    return ((error @ gram) * error).sum()
