"""Grids of a fixed table: ``w ≈ table[code] * absmax`` in blocks of the flattened weight (NF4, arXiv 2305.14314; FP4).

A block is ``group`` consecutive numbers of the row-major weight, so it may straddle rows where they are no multiple of
``group``. **The shape of** ``absmax`` **says which**: ``[out, groups]`` when every block lies inside a row, else
``[blocks]``. Columns can be rounded one at a time (GPTQ) in the first case only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import double
from fewbits.grids.base import Params, group_index, groups_of, spread
from fewbits.grids.codebook import CODEBOOKS, codebook

TINY = 1e-38  # blocks of zeros get zeros, not NaN
LATTICE = 4096

# Factors of the absolute maximum that a search tries. Below 1 the largest are clipped; up to 1.4 the largest comes to
# the table's second largest number (0.72 of NF4), and the finer steps around zero reach further.
SEARCH = (1.0, *(i / 20 for i in range(14, 29) if i != 20))


@dataclass(frozen=True)
class Table:
    """The numbers of ``codebook``, scaled by the absolute maximum of each block of ``group`` (-1: a row), or by the one
    of its ``ratios`` (pairs as for :class:`Int`; the second counts) that ``fit`` finds best.

    Params: ``absmax`` float32 ``[out, groups]`` or ``[blocks]``; ``g_idx`` int32 ``[in]`` only when groups are not
    consecutive columns. With ``nested`` the maxima are quantized once the codes are chosen (:meth:`settle`, double
    quantization): ``absmax`` becomes uint8, and ``nested``, ``offset`` join it (see ``double.py``).
    """

    codebook: str = "nf4"
    group: int = 64
    nested: bool = False
    ratios: tuple[tuple[float, float], ...] = ((1.0, 1.0),)

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise RequestError(f"codebook {self.codebook!r} is unknown; allowed: {', '.join(CODEBOOKS)}")
        if self.group != -1 and self.group < 1:
            raise RequestError(
                f"block size {self.group} is not possible; give a positive number, or -1 for a whole row"
            )

    width = 1

    @property
    def period(self) -> int:
        return self.group

    @property
    def search(self) -> tuple[tuple[float, float], ...]:
        """``ratios`` worth trying."""
        return tuple((r, r) for r in SEARCH)

    @property
    def levels(self) -> int:
        """Number of codes."""
        return len(codebook(self.codebook).values)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.levels - 1).bit_length()

    def straddles(self, shape: tuple[int, int]) -> bool:
        """Whether blocks of a weight ``(out, in)`` cross from one row into the next."""
        return self.group != -1 and shape[0] > 1 and shape[1] % self.group != 0

    def blocks(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of ``absmax`` for a weight ``(out, in)``."""
        if self.straddles(shape):
            return (groups_of(shape[0] * shape[1], self.group),)
        return shape[0], groups_of(shape[1], self.group)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The absolute maximum of every block, exact, times the ratio of the least squared error; see :class:`Grid`.

        Errors are read off at the nearest of ``LATTICE`` points between the block's maximum and minus that: within
        1 % of the least, and all ratios cost one pass over the weight.
        """
        blocks, ratios = self._blocked(w.float()), tuple(ratio for _, ratio in self.ratios)
        most = blocks.abs().amax(1)
        if len(ratios) > 1:
            at = (blocks / most.clamp(min=TINY)[:, None]).add_(1).mul_(LATTICE / 2).round_().int()
            weight = None if importance is None else self._blocked(importance.float().expand_as(w).contiguous())
            errors = F.embedding_bag(
                at, _errors(self.codebook, ratios).to(w.device), mode="sum", per_sample_weights=weight
            )
            most = most * torch.tensor(ratios, device=w.device)[errors.argmin(1)]
        return {"absmax": most.reshape(self.blocks(_shape(w)))}

    def settle(self, p: Params) -> Params:
        """Parameters as they are stored: the maxima doubly quantized if the grid says so, once."""
        return p | double.compress(p["absmax"]) if self.nested and p["absmax"].is_floating_point() else p

    def absmax(self, p: Params) -> Tensor:
        """The absolute maxima that ``p`` stands for, in floating point and in the shape of ``p["absmax"]``."""
        return p["absmax"] if p["absmax"].is_floating_point() else double.expand(p)

    def index(self, p: Params, columns: int) -> Tensor:
        """int64 ``[columns]``: the group of each column."""
        return p["g_idx"].long() if "g_idx" in p else group_index(columns, self.group, p["absmax"].device)

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes of ``w * (1/absmax)``, uint8 of the shape of ``w``; ties to the lower value."""
        return codebook(self.codebook).nearest(self._times(w, 1 / self.absmax(p).clamp(min=TINY), p))

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """``table[code] * absmax``, float32 (float64 when ``absmax`` is)."""
        absmax = self.absmax(p)
        return self._times(codebook(self.codebook).lookup(codes, absmax.dtype), absmax, p)

    def looked_up(self, p: Params, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The same numbers as a table float32 ``[levels]`` times factors ``[out, groups]``; None if blocks straddle."""
        return None if self.straddles(shape) else (codebook(self.codebook).values, self.absmax(p).float())

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Grid.feedback`. Raises RequestError when blocks straddle rows."""
        absmax = self.absmax(p)
        if absmax.ndim != 2:
            raise RequestError(self.inseparable(_shape(w)) or "absmax has lost its rows")
        book, absmax = codebook(self.codebook), spread(absmax.to(w.dtype), index, len(w))
        inverse = 1 / absmax.clamp(min=TINY)
        codes, errors = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
        for j in range(w.shape[1]):
            code = book.nearest(w[:, j] * inverse[:, j])
            e = (w[:, j] - book.lookup(code, w.dtype) * absmax[:, j]) / u[j, j]
            w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
            codes[:, j], errors[:, j] = code, e
        return codes, errors

    def inseparable(self, shape: tuple[int, int]) -> str | None:
        """Why columns of a weight ``(out, in)`` cannot be rounded one at a time; None when they can."""
        if not self.straddles(shape):
            return None
        return (
            f"blocks of {self.group} straddle rows of {shape[1]} columns, so columns cannot be rounded one at a time; "
            "give a block size that divides them, or round to nearest"
        )

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight: 4.5 for NF4 in blocks of 64, 4.127 with double quantization."""
        count = 1
        for n in self.blocks(shape):
            count *= n
        shared = 8 * count + 32 * groups_of(count, double.BLOCK) + 32 if self.nested else 32 * count
        return self.bits + shared / (shape[0] * shape[1])

    def _blocked(self, x: Tensor) -> Tensor:
        """``x`` as ``[blocks, group]``, zeros at the end of the last."""
        group = x.shape[1] if self.group == -1 else self.group
        return torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % group)).view(-1, group)

    def _times(self, x: Tensor, s: Tensor, p: Params) -> Tensor:
        """``x [rows, columns]`` times the number ``s`` of its block."""
        if "g_idx" in p:
            return x * spread(s, self.index(p, x.shape[1]), len(x))
        if s.shape != self.blocks(_shape(x)):
            raise RequestError(f"absmax of shape {tuple(s.shape)} does not fit a weight of shape {tuple(x.shape)}")
        return (self._blocked(x) * s.reshape(-1, 1)).view(-1)[: x.numel()].view(x.shape)


@lru_cache
def _errors(name: str, ratios: tuple[float, ...]) -> Tensor:
    """Squared error of each lattice point on the table times each ratio, float32 ``[LATTICE + 1, ratios]``."""
    book, x = codebook(name), torch.linspace(-1, 1, LATTICE + 1)
    return torch.stack([(book.lookup(book.nearest(x / r)) * r - x).square() for r in ratios], 1)


def _shape(x: Tensor) -> tuple[int, int]:
    return int(x.shape[0]), int(x.shape[1])
