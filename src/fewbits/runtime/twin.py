"""Quantized weights for GPUs: which grids the Triton twins hold, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Bilevel, Float, Int, Learned, Table, double, spread
from fewbits.grids.codebook import codebook
from fewbits.kernels import gpu, triton, words
from fewbits.tensor import Quantized


def pack(q: Quantized) -> Any:
    """``q`` as a weight of :mod:`fewbits.kernels.gpu`, or None where twins do not run or do not hold it."""
    packer = PACKERS.get(type(q.grid))
    if packer is None or q.residual is not None or not triton.usable(q.codes.device):
        return None
    try:
        return packer(q)
    except RequestError:
        return None  # groups that are not even: the dense weight serves


def unpack(grid: Any, weight: Any, kept: dict[str, Tensor]) -> Quantized:
    """What :func:`pack` was given, integers with the parameters of every row written out. ``kept`` are the parameters
    of other grids."""
    if not isinstance(grid, Int):
        bytewise = isinstance(weight, gpu.ByteWeight)
        codes = weight.codes.view(torch.uint8) if bytewise else words.unpack(weight.codes, weight.bits, weight.shape[1])
        return Quantized(grid, codes, kept)
    codes, scale, zero, g_idx = weight.unpack()
    params = {"scale": scale, "zero": zero, "g_idx": g_idx}
    return Quantized(grid, codes, {name: p for name, p in params.items() if p is not None})


def _ints(q: Quantized) -> gpu.IntWeight:
    grid: Any = q.grid
    rows, groups = q.shape[0], torch.arange(q.params["scale"].shape[1], device=q.codes.device)
    scale, zero = (
        None if p is None else spread(p, groups, rows).expand(rows, -1)
        for p in (q.params["scale"], q.params.get("zero"))
    )
    assert scale is not None
    return gpu.pack_int(q.codes, scale, zero, grid.bits, grid.group, q.params.get("g_idx"))


def _table(q: Quantized) -> gpu.TableWeight | None:
    """NF4 and FP4, with the absolute maxima as they are stored: doubly quantized ones are read as 8 bits."""
    grid: Any = q.grid
    if grid.levels != 16 or "g_idx" in q.params:
        return None
    absmax, values = q.params["absmax"], codebook(grid.codebook).values.to(q.codes.device)
    nested = None
    if not absmax.is_floating_point():
        maps = double.dynamic_map().values.to(q.codes.device)
        nested = (maps, q.params["nested"].float(), q.params["offset"].float())
    block = q.shape[1] if grid.group == -1 else grid.group
    by_row = not grid.straddles(q.shape)
    return gpu.pack_table(q.codes, absmax if nested else absmax.float(), values, block, by_row, nested)


def _float(q: Quantized) -> gpu.TableWeight | gpu.ByteWeight | None:
    """E4M3 as its bytes; formats of 4 bits as a table, with one float32 factor for each block."""
    grid: Any = q.grid
    if "g_idx" in q.params:
        return None
    rows, columns = (whole if own == -1 else own for own, whole in zip((grid.rows, grid.group), q.shape, strict=True))
    if grid.element == "e4m3":
        return gpu.pack_bytes(q.codes.view(gpu.E4M3), grid.step(q.params).float(), (rows, columns))
    if grid.levels != 16:
        return None
    table, factors = grid.looked_up(q.params, q.shape)
    return gpu.pack_table(q.codes, factors.float(), table, columns, by_row=True)


def _rows(q: Quantized) -> gpu.LevelsWeight:
    return gpu.pack_levels(q.codes, q.params["table"])


def _nested(q: Quantized) -> gpu.NestedWeight | None:
    grid: Any = q.grid
    if grid.nested == 0 or "g_idx" in q.params:
        return None
    ranges = [q.params[name] for name in ("scale_base", "scale_step", "zero_base", "zero_step")]
    p = q.params
    return gpu.pack_nested(q.codes, p["scale_code"], p["zero_code"], ranges, grid.bits, grid.group, grid.rows)


PACKERS: dict[type, Callable[[Quantized], Any]] = {
    Int: _ints,
    Table: _table,
    Float: _float,
    Learned: _rows,
    Bilevel: _nested,
}
"""A grid joins with one line; the twin gives its codes back, for the weight to leave the GPU again."""
