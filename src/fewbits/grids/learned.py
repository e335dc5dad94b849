"""Tables of numbers that were learned, one per row: ``w ≈ table[row, code]`` (SqueezeLLM, arXiv 2306.07629).

No scales, no groups: bits per weight are ``bits + 16 · 2^bits / in``. ``fit`` is weighted k-means, solved exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids.base import Params, feedback
from fewbits.kernels.cluster import kmeans


@dataclass(frozen=True)
class Learned:
    """``2**bits`` numbers for each row. Params: ``table`` float16 ``[out, 2**bits]``, rising."""

    bits: int = 3

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RequestError(f"bits {self.bits} is not available; allowed: 2 to 8")

    width = 1
    period = -1
    by_weight = True
    """``fit`` takes an importance for every weight, not for every column only."""

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 2**self.bits

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Weighted k-means of each row of ``w [out, in]`` under ``importance``, ``[in]`` or ``[out, in]``, not
        negative; rows whose importance is all zero count every weight alike.
        """
        weight = torch.ones_like(w) if importance is None else importance.expand(w.shape)
        scale = weight.amax(1, keepdim=True)  # a factor per row changes nothing, and float32 holds the rest
        weight = torch.where(scale > 0, weight / scale.clamp(min=1e-38), 1)
        return {"table": kmeans(w.float(), weight.float(), self.levels).to(torch.float16)}

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes, uint8 of the shape of ``w``; ties to the lower value."""
        table = p["table"].to(w.dtype)
        return torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, w.contiguous()).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """``table[row, code]``, float32."""
        return p["table"].float().gather(1, codes.long())

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        return feedback(self, w, u, p, index)

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight."""
        return self.bits + 16 * self.levels / shape[1]
