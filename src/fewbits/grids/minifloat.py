"""Floating-point grids: FP8, FP6, FP4, MX and NVFP4. ``w ≈ scale * element``, codes are the element's bit patterns.

**Granularity is the shape of the scale**: ``rows`` and ``group`` that share one, -1 for all of them: a tensor (-1, -1),
a row (1, -1), a group (1, 128), a block (128, 128). Tiles at the edges may be smaller.

    MX     32 columns, scale a power of two (E8M0)                             OCP Microscaling 1.0
    NVFP4  16 columns, scale E4M3, over one ``global`` number for the tensor   ``scale / global``, global = 448*6/absmax

Conventions of the scales are compressed-tensors': absmax / largest in float32, then rounded to the stored dtype, and
codes are chosen for the scale *as stored*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids.base import Params, group_index, groups_of
from fewbits.grids.element import E8M0, ELEMENTS, Element
from fewbits.grids.uniform import SCALE_DTYPES, clip_ratios

STORED = SCALE_DTYPES | {"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}
"""Dtypes in which scales lie in Params; E8M0 as its bit pattern."""

# When a power of two takes one step up, by the significand of a block's absmax in [1, 2): OCP's floor never does, and
# clips the largest; "rceil" (NVIDIA) is the least that does not; "even" first rounds absmax to the element's digits.
CARRY: dict[str, Callable[[Tensor, Element], Tensor]] = {
    "floor": lambda f, e: torch.zeros_like(f),
    "ceil": lambda f, e: f > 1,
    "rceil": lambda f, e: f > e.significand,
    "even": lambda f, e: f >= e.even,
}

# Factors of the scale that a search tries. A power of two has two neighbours; 1.5 puts the largest of an NVFP4 block at
# 4 instead of 6, where the steps around it are finer ("four over six").
SEARCH: dict[str, tuple[float, ...]] = {"e8m0": (1.0, 0.5, 2.0), "e4m3": (1.0, 1.5, 1.25, 0.95, 0.9, 0.85, 0.8)}


@dataclass(frozen=True)
class Float:
    """Numbers of an ``element`` that share a ``scale`` over ``rows`` rows and ``group`` columns (-1: all of them).

    ``ratios`` are the factors of the scale that ``fit`` tries (pairs as for :class:`Int`; the second counts), by the
    error ``|w - q|**norm``; ``quantile`` below 1 puts that quantile of ``|w|`` in the place of the maximum; ``rule`` is
    how E8M0 scales are rounded. ``peak`` is the absmax behind ``global``, where it is settled by more than one weight
    (see :func:`base.tied`); it is not part of what the grid is. Params: ``scale [R, G]`` (E8M0 as uint8); ``global``
    float32 ``[1]`` for E4M3 scales; ``g_idx`` int32 ``[in]`` only when groups are not consecutive columns.
    """

    element: str = "e4m3"
    group: int = -1
    rows: int = 1
    scale: str = "float32"
    rule: str = "even"
    quantile: float = 1.0
    ratios: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    norm: float = 2.0
    peak: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for what, given, allowed in (
            ("element", self.element, ELEMENTS),
            ("scale dtype", self.scale, STORED),
            ("rule", self.rule, CARRY),
        ):
            if given not in allowed:
                raise RequestError(f"{what} {given!r} is unknown; allowed: {', '.join(allowed)}")
        for what, n in (("group size", self.group), ("rows", self.rows)):
            if n != -1 and n < 1:
                raise RequestError(f"{what} {n} is not possible; give a positive number, or -1 for all of them")
        if not 0 < self.quantile <= 1:
            raise RequestError(f"quantile {self.quantile} is not possible; give more than 0, at most 1")

    width = 1

    @property
    def period(self) -> int:
        return self.group

    @cached_property
    def numbers(self) -> Element:
        """The facts about ``element``."""
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.numbers.bits

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.numbers.levels

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of the scales."""
        return STORED[self.scale]

    @property
    def search(self) -> tuple[tuple[float, float], ...]:
        """``ratios`` worth trying for scales of this kind."""
        return tuple((r, r) for r in SEARCH[self.scale]) if self.scale in SEARCH else clip_ratios(0.7, 13)

    def tiles(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape ``(R, G)`` of the scale for a weight ``(out, in)``."""
        return groups_of(shape[0], self.rows), groups_of(shape[1], self.group)

    def tied(self, weights: Sequence[Tensor]) -> Float:
        """See :func:`base.tied`: one ``global`` for all ``weights``."""
        if self.scale != "e4m3" or self.peak is not None:
            return self
        return replace(self, peak=max(float(w.abs().max()) for w in weights))

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Scales by search over ``ratios``; see :class:`Grid`. Raises RequestError when ``w`` is not finite."""
        most = self._most(w)
        if not bool(torch.isfinite(most).all()):
            raise RequestError("this weight holds values that are not finite; check the model")
        shared = self._global(w)
        found = [shared | {"scale": self._stored(most * ratio, shared)} for _, ratio in self.ratios]
        if len(found) == 1:
            return found[0]
        errors = torch.stack([self._error(w, p, importance) for p in found])
        best, scales = errors.argmin(0), torch.stack([p["scale"].view(_BYTES[self.dtype]) for p in found])
        return shared | {"scale": scales.gather(0, best[None])[0].view(self.dtype)}

    def step(self, p: Params) -> Tensor:
        """The factors that ``scale`` (and ``global``) stand for, float32 ``[R, G]`` (float64 when a scale is)."""
        s = p["scale"]
        if s.dtype == torch.uint8:
            return E8M0.decode(s)
        if "global" not in p:
            return s if s.dtype == torch.float64 else s.float()
        return (s.float() / p["global"].float()).to(s.dtype if s.dtype == torch.float64 else torch.float32)

    def index(self, p: Params, columns: int) -> Tensor:
        """int64 ``[columns]``: the group of each column."""
        return p["g_idx"].long() if "g_idx" in p else group_index(columns, self.group, p["scale"].device)

    def encode(self, w: Tensor, p: Params, rounding: str = "nearest", seed: int = 0) -> Tensor:
        """Codes of ``w``, uint8 of its shape: the nearest, or by another of ``element.ROUNDINGS``."""
        s = self._spread(self.step(p), self.index(p, w.shape[1]), len(w))
        return self.numbers.encode(w / s, rounding, seed)

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """``step * number``, float32 (float64 when the scale is)."""
        s = self._spread(self.step(p), self.index(p, codes.shape[1]), len(codes))
        return self.numbers.decode(codes, s.dtype).mul_(s)

    def looked_up(self, p: Params, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The same numbers as a table float32 ``[levels]`` times a factor ``[out, groups]``, up to the last bit: a
        ``global`` number is in the table, so that the factors keep the few digits of a stored scale."""
        codes = torch.arange(self.levels, dtype=torch.uint8, device=p["scale"].device)
        table = self.numbers.decode(codes, torch.float32)
        if "global" in p:
            table, p = table / p["global"].float(), {"scale": p["scale"]}
        step = self.step(p).float()
        return table, self._spread(step, torch.arange(step.shape[1]), shape[0]).expand(shape[0], -1)

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Grid.feedback`: rounding column by column, bit patterns for the whole block at the end."""
        s = self._spread(self.step(p).to(w.dtype), index, len(w))
        scaled, errors = torch.empty_like(w), torch.empty_like(w)
        for j in range(w.shape[1]):
            x = w[:, j] / s[:, j]
            e = (w[:, j] - self.numbers.nearest(x) * s[:, j]) / u[j, j]
            w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
            scaled[:, j], errors[:, j] = x, e
        return self.numbers.encode(scaled), errors

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight: 4.25 for MXFP4, 4.5 for NVFP4 and 32 bits for the tensor."""
        R, G = self.tiles(shape)
        return self.bits + (8 * self.dtype.itemsize * R * G + 32 * (self.scale == "e4m3")) / (shape[0] * shape[1])

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _tiled(self, x: Tensor) -> Tensor:
        """``x`` as ``[R, G, rows, group]``, zeros where tiles at the edges are smaller."""
        rows, group = (n if own == -1 else own for n, own in zip(x.shape, (self.rows, self.group), strict=True))
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % group, 0, -x.shape[0] % rows))
        return x.view(x.shape[0] // rows, rows, x.shape[1] // group, group).transpose(1, 2)

    def _most(self, w: Tensor) -> Tensor:
        """What the largest number has to stand for, float32 ``[R, G]``: the maximum or a quantile of ``|w|``."""
        a = self._tiled(w.abs().float())
        if self.quantile == 1:
            return a.amax((2, 3))
        a = a.flatten(2)
        return a.kthvalue(max(1, round(self.quantile * a.shape[2])), 2).values

    def _global(self, w: Tensor) -> Params:
        if self.scale != "e4m3":
            return {}
        peak = w.abs().max().float() if self.peak is None else torch.tensor(self.peak, device=w.device)
        shared = ELEMENTS["e4m3"].max * self.numbers.max / peak.clamp(min=torch.finfo(torch.float32).tiny)
        return {"global": torch.where(torch.isfinite(shared), shared, 1.0).reshape(1)}

    def _stored(self, most: Tensor, shared: Params) -> Tensor:
        """The scale as stored for tiles whose largest is ``most``; tiles of zeros get some number that is not 0."""
        if self.scale == "e8m0":
            mantissa, exponent = torch.frexp(most)
            biased = exponent - 1 - self.numbers.emax + CARRY[self.rule](2 * mantissa, self.numbers) + E8M0.bias
            return torch.where(most > 0, biased.clamp(0, E8M0.top), 0).to(torch.uint8)
        info = torch.finfo(self.dtype)
        s = most / self.numbers.max
        s = (s * shared["global"] if shared else s).clamp(max=info.max).to(self.dtype)
        return torch.where(s.float() > 0, s.float(), info.eps).to(self.dtype)

    def _error(self, w: Tensor, p: Params, importance: Tensor | None) -> Tensor:
        """Weighted error of every tile, ``[R, G]``."""
        s = self._spread(self.step(p), self.index(p, w.shape[1]), len(w))
        error = (self.numbers.nearest(w.float() / s).mul_(s) - w).abs_().pow_(self.norm)
        error = self._tiled(error if importance is None else error * importance.float())
        return error.sum(3).sum(2)  # one after the other: a flat sum depends on the number of threads

    def _spread(self, s: Tensor, index: Tensor, rows: int) -> Tensor:
        """``s [R, G]`` repeated over the weights that share it: ``[rows, len(index)]``."""
        s = s.index_select(1, index) if s.shape[1] > 1 else s.expand(-1, len(index))
        return s if s.shape[0] in (1, rows) else s.repeat_interleave(self.rows, 0)[:rows]


_BYTES = {t: (torch.uint8, torch.int16, torch.int32)[t.itemsize // 2] for t in STORED.values()}
