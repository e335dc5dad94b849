"""Uniform integer grids: ``w ≈ scale * (code - zero)``, codes ``0 .. 2**bits - 1``.

Codes are unsigned. A signed convention ``q - zp`` with ``q = code - 2**(bits-1)`` is the same grid with another
stored code; layouts convert. Symmetric means full range: ``scale = 2*absmax / (2**bits - 1)``, ``zero = 2**(bits-1)``
(GPTQ, compressed-tensors). Affine keeps real zero on the grid: the range includes 0 and the zero point is an integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits import kernels
from fewbits.errors import RequestError
from fewbits.grids.base import Params, feedback, group_index, groups_of, spread

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def clip_ratios(lowest: float, steps: int, independent: bool = False) -> tuple[tuple[float, float], ...]:
    """Candidates ``(ratio of the lower end, ratio of the upper end)`` for the clipping search, 1.0 first.

    ``independent`` lets the two ends move separately (``steps**2`` candidates), which pays for skewed groups.
    """
    r = [1 - (1 - lowest) * i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]
    return tuple((a, b) for a in r for b in r) if independent else tuple((a, a) for a in r)


@dataclass(frozen=True)
class Int:
    """Integers of ``bits`` bits that share a scale over ``rows`` rows and ``group`` columns (-1: all of them).

    ``ratios`` are the clipping candidates that ``fit`` tries; ``scale`` is the dtype in which scales are stored:
    codes are chosen for the scale *as stored*. ``narrow``, for symmetric grids: ``scale = absmax / (2**(bits-1) - 1)``
    and code 0 unused, so that ``-w`` has the codes of ``w`` mirrored (SmoothQuant, LLM.int8).

    Params: ``scale [R, G]`` in the stored dtype; ``zero [R, G]`` uint8 unless
    symmetric; ``g_idx`` int32 ``[in]`` only when groups are not consecutive columns.
    """

    bits: int = 4
    group: int = 128
    rows: int = 1
    symmetric: bool = False
    scale: str = "float16"
    ratios: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    norm: float = 2.0
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RequestError(f"bits {self.bits} is not available; allowed: 2 to 8")
        if self.group != -1 and self.group < 1:
            raise RequestError(
                f"group size {self.group} is not possible; give a positive number of columns, or -1 for a whole row"
            )
        if self.scale not in SCALE_DTYPES:
            raise RequestError(f"scale dtype {self.scale!r} is unknown; allowed: {', '.join(SCALE_DTYPES)}")
        if self.narrow and not self.symmetric:
            raise RequestError("a narrow range is symmetric; give symmetric: true, or narrow: false")

    width = 1

    @property
    def period(self) -> int:
        return self.group

    @property
    def search(self) -> tuple[tuple[float, float], ...]:
        """``ratios`` worth trying."""
        return clip_ratios(0.7, 13)

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 2**self.bits

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return int(self.narrow)

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """Zero point of the symmetric grid."""
        return 2 ** (self.bits - 1)

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of the scales."""
        return SCALE_DTYPES[self.scale]

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Scales and zeros by search over ``ratios``; see :class:`Grid`. All-zero groups get scale 1."""
        columns = w.shape[1]
        flat, share = (w, self.group) if self.rows == 1 else self._row_tiles(w)
        weight = (
            importance
            if importance is None or self.rows == 1
            else importance.repeat_interleave(flat.shape[1] // columns)
        )
        ratios = torch.tensor(self.ratios, dtype=torch.float32, device=w.device)
        if self.narrow:  # the kernel divides by (2**bits - 1) / 2
            ratios = ratios * (self.qmax / (self.qmax - 1))
        scale, zero = kernels.fit_affine(
            flat.float(), share, self.qmax, self.symmetric, ratios, weight, self.dtype, self.norm
        )
        p = {"scale": scale.to(self.dtype)}
        return p if self.symmetric else p | {"zero": zero.to(torch.uint8)}

    def _row_tiles(self, w: Tensor) -> tuple[Tensor, int]:
        rows = w.shape[0] if self.rows == -1 else self.rows
        group = w.shape[1] if self.group == -1 else self.group
        if w.shape[0] % rows or w.shape[1] % group:
            raise RequestError(
                f"tiles of {rows} x {group} do not cover a weight of shape {tuple(w.shape)}; choose divisors"
            )
        columns_first = w.reshape(w.shape[0] // rows, rows, w.shape[1]).transpose(1, 2)
        return columns_first.reshape(w.shape[0] // rows, -1), group * rows

    def zero_points(self, p: Params) -> Tensor:
        """Zero points as float32, of the scale's shape, for either kind of grid."""
        return (
            p["zero"].float()
            if "zero" in p
            else torch.full(p["scale"].shape, float(self.middle), device=p["scale"].device)
        )

    def index(self, p: Params, columns: int) -> Tensor:
        """int64 ``[columns]``: the group of each column."""
        return p["g_idx"].long() if "g_idx" in p else group_index(columns, self.group, p["scale"].device)

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes, uint8 of the shape of ``w``; ties to even, before the zero point is added."""
        i = self.index(p, w.shape[1])
        steps = (w / spread(_real(p["scale"]), i, len(w))).round_()  # in place: of a large weight every copy counts
        return steps.add_(spread(self.zero_points(p), i, len(w))).clamp_(self.qmin, self.qmax).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """``scale * (code - zero)``, float32 (float64 when the scale is)."""
        i = self.index(p, codes.shape[1])
        steps = codes - spread(self.zero_points(p), i, len(codes))
        return steps * spread(_real(p["scale"]), i, len(codes))

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Grid.feedback`; one fused kernel call."""
        if self.narrow:
            return feedback(self, w, u, p, index)
        rows = len(w)
        scale, zero = (t.to(w.dtype).expand(rows, -1) for t in (p["scale"], self.zero_points(p)))
        return kernels.sweep_block_(w, u, scale, zero, index.int(), self.qmax)

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight, parameters included; zeros are stored in ``bits`` bits."""
        per_tile = self.dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        rows = 1 if self.rows == -1 else shape[0] // self.rows
        return self.bits + per_tile * rows * groups_of(shape[1], self.group) / (shape[0] * shape[1])


def _real(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
