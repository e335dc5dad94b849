"""LLM.int8()'s weights: ``w ≈ code * absmax / 127``, one absolute maximum per row (arXiv 2208.07339, section 2.2).

Rounding is bitsandbytes', to the bit: the weight becomes float16 first, then ``round(w * (127 / absmax))``. Codes are
stored unsigned, 128 above the signed one; -128 does not occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.grids.base import Params, feedback
from fewbits.grids.uniform import Int

MIDDLE, LARGEST = 128, 127
_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Vectorwise:
    """Params: ``absmax`` float32 ``[out, 1]``; ``g_idx`` never."""

    width = 1
    bits = 8
    period = -1
    levels = 255

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The absolute maximum of every row, of the weights in float16."""
        return {"absmax": _half(w).abs().amax(1, keepdim=True)}

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes, uint8 of the shape of ``w``; ties to even. Rows of zeros get the code of zero."""
        absmax = p["absmax"].to(w.dtype)
        q = torch.round(_half(w).to(w.dtype) * torch.where(absmax > 0, LARGEST / absmax, 0))
        return (q.clamp_(-LARGEST, LARGEST) + MIDDLE).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """``(code - 128) * (absmax / 127)``, float32 (float64 when ``absmax`` is)."""
        return (codes.to(p["absmax"].dtype) - MIDDLE) * self.step(p)

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Grid.feedback`."""
        return feedback(self, w, u, p, index)

    def step(self, p: Params) -> Tensor:
        """``absmax / 127`` as bitsandbytes rounds it: times the reciprocal."""
        return p["absmax"] * (1 / LARGEST)

    def uniform(self, p: Params) -> tuple[Int, Params]:
        """The same numbers as a symmetric integer grid, for kernels that know those."""
        return Int(8, -1, symmetric=True, scale="float32"), {"scale": self.step(p)}

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight."""
        return 8 + 32 / shape[1]


def _half(w: Tensor) -> Tensor:
    """``w`` rounded to float16, in float32; what float16 cannot hold becomes its largest number."""
    return w.clamp(-_HALF, _HALF).half().float()
