"""GGUF's block types as grids: ``w ≈ d * scale_j * value[code] + offset_j`` with shared half-precision ``d``.

Blocks have 32 or 256 columns. The K types and IQ4_XS cut a block of 256 into sub-blocks with an integer scale each
(and an integer offset: Q2_K, Q4_K, Q5_K), so parameters are known only when the whole block is: ``period`` is 256.
What each type is stands in :data:`TYPES`; how it lies in bytes is the layout's affair (``formats/gguf_blocks.py``).

Two ways to codes. ``search`` finds codes and parameters together as llama.cpp's reference quantizers do, to the bit
(sources: ggml-quants.c, and for the ideas k-quants, llama.cpp pull request 1684). ``fit`` keeps the parameters only;
``encode`` then takes the nearest code for the parameters as stored, which is never worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewbits import kernels
from fewbits.errors import RequestError
from fewbits.grids import base
from fewbits.grids.base import Params
from fewbits.kernels.blocks import BlockShape, search_blocks

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
TINY = 1e-30  # stands for a scale of zero where one divides by it


@dataclass(frozen=True)
class Type:
    """A block type: its ``shape``, bytes per block, and the value of each code.

    Codes are ``0 .. levels-1`` and mean ``code - zero`` unless there is a ``table``.
    """

    shape: BlockShape
    size: int
    levels: int
    zero: int = 0
    table: tuple[int, ...] = ()


TYPES: dict[str, Type] = {
    "q4_0": Type(BlockShape(2, 32), 18, 16, 8),
    "q4_1": Type(BlockShape(3, 32, m=True), 20, 16),
    "q5_0": Type(BlockShape(6, 32), 22, 32, 16),
    "q5_1": Type(BlockShape(7, 32, m=True), 24, 32),
    "q8_0": Type(BlockShape(8, 32), 34, 256, 128),
    "q2_k": Type(BlockShape(10, 256, 16, m=True, mins=True), 84, 4),
    "q3_k": Type(BlockShape(11, 256, 16), 110, 8, 4),
    "q4_k": Type(BlockShape(12, 256, 32, m=True, mins=True), 144, 16),
    "q5_k": Type(BlockShape(13, 256, 32, m=True, mins=True), 176, 32),
    "q6_k": Type(BlockShape(14, 256, 16), 210, 64, 32),
    "iq4_nl": Type(BlockShape(20, 32), 18, 16, table=IQ4),
    "iq4_xs": Type(BlockShape(23, 256, 32), 136, 16, table=IQ4),
    "tq1_0": Type(BlockShape(34, 256), 54, 3, 1),
    "tq2_0": Type(BlockShape(35, 256), 66, 4, 1),
    "mxfp4": Type(BlockShape(39, 32), 17, 16, table=E2M1_TWICE),
}


@dataclass(frozen=True)
class Block:
    """One of :data:`TYPES`. Params: ``d``, ``m`` float16 ``[out, in/block]``; ``scales``, ``mins`` int8 ``[out,
    in/sub]``; MXFP4's ``d`` is uint8, the exponent plus 127 of twice the scale.
    """

    name: str = "q4_k"

    def __post_init__(self) -> None:
        if self.name not in TYPES:
            raise RequestError(f"block type {self.name!r} is unknown; allowed: {', '.join(TYPES)}")

    width = 1

    @property
    def type(self) -> Type:
        return TYPES[self.name]

    @property
    def period(self) -> int:
        """Columns of a block."""
        return self.type.shape.block

    @property
    def segment(self) -> int:
        """Columns that share every parameter: those of a sub-block. The ``index`` of :meth:`feedback` counts these."""
        return self.type.shape.sub or self.type.shape.block

    @property
    def levels(self) -> int:
        return self.type.levels

    @cached_property
    def values(self) -> Tensor:
        """float32 ``[levels]``: what each code stands for, before scale and offset."""
        t = self.type
        return torch.tensor(t.table or [c - t.zero for c in range(t.levels)], dtype=torch.float32)

    def search(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Params]:
        """Codes and parameters together, bit for bit those of llama.cpp. Raises RequestError unless ``in`` is a
        multiple of the block.
        """
        if w.shape[1] % self.period:
            raise RequestError(
                f"{self.name} has blocks of {self.period} columns, the weight has {w.shape[1]}; take a type of 32"
            )
        codes, p = search_blocks(self.type.shape, w.float(), importance)
        if self.name == "mxfp4":
            p["d"] = p["d"].view(torch.int16).to(torch.uint8)
        return codes, p

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The parameters that :meth:`search` finds."""
        return self.search(w, importance)[1]

    def step(self, p: Params) -> Tensor:
        """float32 ``[out, in/segment]``: what the values are multiplied by."""
        d = exponent(p["d"]) if self.name == "mxfp4" else p["d"].float()
        sub = p.get("scales")
        return d if sub is None else d.repeat_interleave(sub.shape[1] // d.shape[1], 1) * sub.float()

    def shift(self, p: Params) -> Tensor | None:
        """float32 ``[out, in/segment]``: what is added, None when there is no offset."""
        if "m" not in p:
            return None
        m, sub = p["m"].float(), p.get("mins")
        return m if sub is None else -(m.repeat_interleave(sub.shape[1] // m.shape[1], 1) * sub.float())

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes, uint8, for the parameters as stored; where the scale is zero, the code of zero."""
        index = self._index(p, w.shape[1])
        step, shift = self.step(p).index_select(1, index), self.shift(p)
        x = w.float() if shift is None else w.float() - shift.index_select(1, index)
        x = torch.where(step == 0, 0, x / step).nan_to_num(0.0)
        if not self.type.table:
            return (torch.round(x) + self.type.zero).clamp_(0, self.levels - 1).to(torch.uint8)
        ordered, order = self.values.to(w.device).unique(return_inverse=True)
        code = torch.empty(len(ordered), dtype=torch.uint8, device=w.device)
        code[order.flip(0)] = torch.arange(self.levels - 1, -1, -1, dtype=torch.uint8, device=w.device)
        middle = (ordered[1:] + ordered[:-1]) / 2
        return code[torch.searchsorted(middle, x.contiguous(), right=True)]

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """float32 ``[out, in]``, the bits of gguf-py and llama.cpp."""
        index = self._index(p, codes.shape[1])
        step, shift = self.step(p).index_select(1, index), self.shift(p)
        t = self.type
        value = self.values.to(codes.device)[codes.long()] if t.table else codes.float() - t.zero
        value = step * value
        return value if shift is None else value + shift.index_select(1, index)

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Grid.feedback`. An offset moves weights and values alike, so errors are those of the grid
        without it: one fused kernel call, except for tables.
        """
        if self.type.table:
            return base.feedback(self, w, u, p, index)
        shift = self.shift(p)
        moved = None if shift is None else shift.to(w.dtype).index_select(1, index)
        if moved is not None:
            w -= moved
        step = self.step(p).to(w.dtype)
        step = torch.where(step == 0, TINY, step)
        zero = torch.full_like(step, self.type.zero)
        result = kernels.sweep_block_(w, u, step, zero, index.int(), self.levels - 1)
        if moved is not None:
            w += moved
        return result

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight."""
        return 8 * self.type.size / self.period

    def _index(self, p: Params, columns: int) -> Tensor:
        if "g_idx" in p:
            return p["g_idx"].long()
        return torch.arange(columns, device=p["d"].device) // self.segment


def exponent(e: Tensor) -> Tensor:
    """``2^(e - 128)`` of the bytes ``e``, float32: half of what E8M0 means, since the table holds doubled values."""
    e = e.int()
    bits = torch.where(
        e < 2,
        torch.tensor(0x00200000, dtype=torch.int32, device=e.device) << e.clamp(max=1),
        (e - 1).clamp(min=0) << 23,
    )
    return bits.view(torch.float32)
