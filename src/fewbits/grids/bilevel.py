"""Integers whose scales and zero points are quantized too (SpQR, arXiv 2306.03078, section 4.2): ``w ≈ s (q - z)``.

Groups are small (16 columns of one row); ``s`` and ``z`` of ``rows`` consecutive rows in one group of columns lie on a
grid of ``nested`` bits: ``s = scale_base + scale_step * code``, the same for ``z``, which is no integer. The paper
writes ``step * (code - zero)``; with the smallest scale as ``base`` a scale cannot become zero or negative.

Bits per weight: ``bits + 2 nested / group + 64 / (group rows)`` = 3.625 for 3 bits in groups of 16 x 1 and tiles of
16 x 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbits import kernels
from fewbits.errors import RequestError
from fewbits.grids.base import Params, group_index, groups_of

SMALLEST = 2.0**-24  # of float16
MOST = 65504.0


@dataclass(frozen=True)
class Bilevel:
    """Codes of ``bits`` bits in groups of ``group`` columns (-1: a row); ``nested`` bits for scales and zero points,
    which ``rows`` rows share a grid for. ``nested`` 0 leaves both in float32: what is left of SpQR's quantizer.

    Params: ``scale_code``, ``zero_code`` uint8 ``[out, G]``; ``scale_base``, ``scale_step``, ``zero_base``,
    ``zero_step`` float16 ``[ceil(out / rows), G]``. With ``nested`` 0: ``scale``, ``zero`` float32 ``[out, G]``.
    """

    bits: int = 3
    group: int = 16
    nested: int = 3
    rows: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not 0 <= self.nested <= 8:
            raise RequestError(
                f"{self.bits} bits with scales of {self.nested} bits are not available; allowed: 2 to 8, and 0 to 8"
            )
        if (self.group != -1 and self.group < 1) or self.rows < 1:
            raise RequestError(
                f"groups of {self.group} columns and {self.rows} rows are not possible; give positive numbers"
            )

    width = 1

    @property
    def period(self) -> int:
        return self.group

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 2**self.bits

    @property
    def by_range(self) -> bool:
        """Whether parameters depend on the smallest and the largest weight of a group alone."""
        return self.nested == 0

    @property
    def screen(self) -> Bilevel:
        """The same without the second level, for one group of any length."""
        return replace(self, group=-1, nested=0)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Range of each group, zero not forced into it; then the nested codes that leave the smallest error, weighted
        by ``importance [in]``. A constant group has the range -1..1.
        """
        v, weight = self._grouped(w.float(), importance)
        lo, hi = v.amin(-1), v.amax(-1)
        flat = lo == hi
        lo, hi = torch.where(flat, -1.0, lo), torch.where(flat, 1.0, hi)
        top = self.levels - 1
        scale, middle = ((hi - lo) / top).clamp(min=SMALLEST), (hi + lo) / 2
        if self.nested == 0:
            return {"scale": scale, "zero": top / 2 - middle / scale}

        def error(s: Tensor, z: Tensor) -> Tensor:
            s, z = s[..., None], z[..., None]
            q = torch.round(v / s + z).clamp_(0, top)
            return ((s * (q - z) - v).square() * weight).sum(-1)

        base, step = self._range(scale, SMALLEST)
        s_code = self._best(lambda s: error(s, top / 2 - middle / s), base, step, len(w))
        scale = self._value(s_code, base, step)
        zero_base, zero_step = self._range(top / 2 - middle / scale, -MOST)
        z_code = self._best(lambda z: error(scale, z), zero_base, zero_step, len(w))
        found = {"scale_code": s_code, "scale_base": base, "scale_step": step}
        return found | {"zero_code": z_code, "zero_base": zero_base, "zero_step": zero_step}

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes, uint8 of the shape of ``w``."""
        s, z = self._spread(p, w.shape[1])
        return torch.round(w / s + z).clamp_(0, self.levels - 1).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """``s (q - z)``, float32 (float64 when unquantized scales are)."""
        s, z = self._spread(p, codes.shape[1])
        return s * (codes - z)

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        codes, errors, _ = self.keep(w, u, p, index, math.inf)
        return codes, errors

    def keep(self, w: Tensor, u: Tensor, p: Params, index: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`feedback` that leaves weights off the grid, see :func:`fewbits.kernels.sweep_kept_`."""
        groups, segment = torch.unique(index, return_inverse=True)
        s, z = (t.to(w.dtype) for t in self.statistics({k: t.index_select(1, groups) for k, t in p.items()}))
        return kernels.sweep_kept_(w, u, s, z, segment.int(), self.levels - 1, limit)

    def statistics(self, p: Params) -> tuple[Tensor, Tensor]:
        """Scales and zero points that ``p`` stands for, ``[out, G]``."""
        if "scale" in p:
            return p["scale"], p["zero"]
        found = [self._value(p[f"{k}_code"], p[f"{k}_base"], p[f"{k}_step"]) for k in ("scale", "zero")]
        return found[0], found[1]

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight."""
        groups, count = groups_of(shape[1], self.group), shape[0] * shape[1]
        if self.nested == 0:
            return self.bits + 64 * shape[0] * groups / count
        tiles = -(-shape[0] // self.rows)
        return self.bits + groups * (2 * self.nested * shape[0] + 64 * tiles) / count

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _grouped(self, w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """``w`` as ``[out, G, group]`` and weights ``[G, group]``; a short last group repeats its last column at
        weight 0.
        """
        columns = w.shape[1]
        group = columns if self.group == -1 else self.group
        missing = -columns % group
        weight = torch.ones(columns, device=w.device) if importance is None else importance.float()
        if missing:
            w = torch.cat([w, w[:, -1:].expand(-1, missing)], 1)
            weight = torch.nn.functional.pad(weight, (0, missing))
        return w.view(len(w), -1, group), weight.view(-1, group)

    def _range(self, x: Tensor, least: float) -> tuple[Tensor, Tensor]:
        """Base and step float16 ``[tiles, G]`` over the rows of a tile of ``x [out, G]``; a short last tile repeats its
        last row.
        """
        missing = -len(x) % self.rows
        tiles = torch.cat([x, x[-1:].expand(missing, -1)]).view(-1, self.rows, x.shape[1])
        lo = tiles.amin(1).clamp(least, MOST).half()
        lo = lo.clamp(min=least) if least > 0 else lo
        step = ((tiles.amax(1).clamp(max=MOST) - lo.float()).clamp(min=0) / (2**self.nested - 1)).half()
        return lo, step

    def _best(self, error: object, base: Tensor, step: Tensor, rows: int) -> Tensor:
        """The codes ``[out, G]`` with the smallest ``error(value)``; the first of equals."""
        best, chosen = None, None
        for code in range(2**self.nested):
            codes = torch.full((rows, base.shape[1]), code, dtype=torch.uint8, device=base.device)
            e = error(self._value(codes, base, step))  # type: ignore[operator]
            if best is None or chosen is None:
                best, chosen = e, codes
            else:
                chosen = torch.where(e < best, codes, chosen)
                best = torch.minimum(e, best)
        assert chosen is not None
        return chosen

    def _value(self, code: Tensor, base: Tensor, step: Tensor) -> Tensor:
        base, step = (t.float().repeat_interleave(self.rows, 0)[: len(code)] for t in (base, step))
        return base + step * code

    def _spread(self, p: Params, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each column: only the groups that are asked for are computed."""
        some = next(iter(p[k] for k in ("scale", "scale_code") if k in p))
        index = p["g_idx"].long() if "g_idx" in p else group_index(columns, self.group, some.device)
        s, z = self.statistics({k: t.index_select(1, index) for k, t in p.items() if k != "g_idx"})
        return s, z
