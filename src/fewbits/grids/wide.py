"""Integers of 16 bits: ``w ≈ scale * code`` with codes -32767..32767, ``scale = absmax / 32767``.

The error is at most ``absmax / 65534``; bfloat16's is ``|w| / 512``. For the few weights of a recipe that 8 bits hurt.
The only grid with signed codes, in int16; products dequantize it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids.base import Params, feedback, group_index, groups_of, spread

LARGEST = 32767


@dataclass(frozen=True)
class Int16:
    """Params: ``scale`` float32 ``[out, groups]``; ``g_idx`` int32 ``[in]`` when groups are not consecutive columns.

    ``group`` columns of a row share a scale; -1: the whole row.
    """

    group: int = -1

    width = 1
    bits = 16
    levels = 2 * LARGEST + 1

    def __post_init__(self) -> None:
        if self.group != -1 and self.group < 1:
            raise RequestError(
                f"group size {self.group} is not possible; give a positive number of columns, or -1 for a whole row"
            )

    @property
    def period(self) -> int:
        return self.group

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """A 32767th of the absolute maximum of every group; groups of zeros get 1."""
        index = group_index(w.shape[1], self.group, w.device)
        absmax = torch.zeros(len(w), groups_of(w.shape[1], self.group), device=w.device)
        absmax.scatter_reduce_(1, index.expand(len(w), -1), w.float().abs(), "amax")
        return {"scale": torch.where(absmax > 0, absmax / LARGEST, 1.0)}

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes, int16 of the shape of ``w``; ties to even."""
        return torch.round(w / self._spread(p, w.shape)).clamp_(-LARGEST, LARGEST).to(torch.int16)

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """``scale * code``, float32 (float64 when the scale is)."""
        return codes * self._spread(p, codes.shape)

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Grid.feedback`."""
        return feedback(self, w, u, p, index)

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight."""
        return self.bits + 32 * groups_of(shape[1], self.group) / shape[1]

    def _spread(self, p: Params, shape: torch.Size) -> Tensor:
        columns = shape[1]
        index = p["g_idx"].long() if "g_idx" in p else group_index(columns, self.group, p["scale"].device)
        return spread(p["scale"], index, shape[0])
