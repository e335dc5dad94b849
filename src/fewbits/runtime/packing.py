"""From a quantized weight to what the C++ products read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbits.grids import Int, group_index, spread
from fewbits.grids.bilevel import Bilevel
from fewbits.grids.learned import Learned
from fewbits.kernels import qlinear, qrows, qtable
from fewbits.tensor import Quantized

LOOKED_UP = (16, 256)
"""Numbers of codes of the tables that the kernels keep as they are: their codes come back from a packed weight."""


def pack(q: Quantized) -> qlinear.PackedWeight | None:
    """``q`` in the kernels' order, or None for what they do not hold: residuals, uneven groups, blocks across rows."""
    if q.residual is not None or q.codes.device.type != "cpu" or not qlinear.available():
        return None
    g_idx = q.params.get("g_idx")
    if g_idx is not None and not _even(g_idx, q.grid.period):
        return None
    return PACKERS.get(type(q.grid), _looked_up)(q)


def unpack(grid: Any, packed: qlinear.PackedWeight, kept: dict[str, Tensor]) -> Quantized:
    """What :func:`pack` was given. ``kept`` are the params of a grid that is looked up; integers need none."""
    if not isinstance(grid, Int):
        return Quantized(grid, qlinear.unpack_codes(packed), kept)
    codes, scale, zero, g_idx = qlinear.unpack_weight(packed)
    # One row per scale, which is as good as shared ones.
    params = {"scale": scale} | ({} if grid.symmetric else {"zero": zero})
    return Quantized(grid, codes, params if g_idx is None else params | {"g_idx": g_idx})


def _ints(q: Quantized) -> qlinear.PackedWeight:
    grid: Any = q.grid
    rows, groups = q.shape[0], torch.arange(q.params["scale"].shape[1])
    scale = spread(q.params["scale"], groups, rows).expand(rows, -1)
    zero = spread(grid.zero_points(q.params), groups, rows).expand(rows, -1).to(torch.uint8)
    return qlinear.pack_weight(q.codes, scale, zero, grid.bits, grid.group, q.params.get("g_idx"))


def _rows(q: Quantized) -> qlinear.PackedWeight | None:
    return qrows.pack_rows(q.codes, q.params["table"]) if q.grid.levels <= 16 else None


def _nested(q: Quantized) -> qlinear.PackedWeight | None:
    """The kernels share ranges among the 16 rows that they take at a time."""
    grid: Any = q.grid
    if grid.nested == 0 or grid.rows != qlinear.ROWS or "g_idx" in q.params:
        return None
    names = ("scale_base", "scale_step", "zero_base", "zero_step")
    ranges = torch.stack([q.params[name] for name in names], -1)
    return qlinear.pack_nested(q.codes, q.params["scale_code"], q.params["zero_code"], ranges, grid.bits, grid.group)


def _looked_up(q: Quantized) -> qlinear.PackedWeight | None:
    grid: Any = q.grid
    found = grid.looked_up(q.params, q.shape) if hasattr(grid, "looked_up") and grid.levels in LOOKED_UP else None
    if found is None:
        return None
    table, factors = found
    return qtable.pack_table(q.codes, _narrow(factors), table, grid.period, q.params.get("g_idx"))


PACKERS: dict[type, Callable[[Quantized], qlinear.PackedWeight | None]] = {
    Int: _ints,
    Learned: _rows,
    Bilevel: _nested,
}
"""A grid joins with one line; others are tables, if they say so, or have no product here."""


def _narrow(scale: Tensor) -> Tensor:
    """``scale`` in 16 bits where these hold it exactly: E8M0 and E4M3 scales are bfloat16 numbers."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scale.to(dtype).to(scale.dtype), scale):
            return scale.to(dtype)
    return scale


def _even(g_idx: Tensor, group: int) -> bool:
    """Whether every group has as many columns as consecutive groups would have."""
    columns = len(g_idx)
    return torch.equal(torch.sort(g_idx.long()).values, group_index(columns, group))
