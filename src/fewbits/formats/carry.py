"""Which grids hold the very same numbers: the ways in which a quantized weight can change its format without loss.

A *twin* of a weight has other codes and parameters and equals it to the bit. Each candidate below follows from one
identity, and every one is decoded and compared before it is believed:

    (c - z) s                the same codes and zeros in more bits; a symmetric z moves with the middle
    (c - z) s = (c' - 2^b') s    an affine grid as a symmetric one of one more bit: c' = c - z + 2^b'
    d c + m, m = -z s        GGUF's offsets, where -z s is a half-precision number
    d (c - 8)                GGUF's q4_0 (q5_0, q8_0): a symmetric grid in groups of 32; wider groups repeat d
    (c - 128) absmax / 127   LLM.int8()'s rows: 8 bits, symmetric, a float32 scale per row
    2^e E2M1                 MXFP4 is one grid under two names
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbits.grids import Block, Float, Int, Params, Vectorwise
from fewbits.grids.uniform import SCALE_DTYPES
from fewbits.grids.vectorwise import LARGEST
from fewbits.tensor import Quantized

# Symmetric and offset block types by the bits of their codes.
_SYMMETRIC = {4: "q4_0", 5: "q5_0", 8: "q8_0"}
_OFFSET = {4: "q4_1", 5: "q5_1"}
_GROUP = 32
_MX = Float("e2m1", 32, scale="e8m0")


def twins(q: Quantized) -> Iterator[Quantized]:
    """``q`` itself, then every other form of it, narrow ones first; all decode to the same float32 numbers."""
    yield q
    if q.residual is not None:
        return
    wanted = q.dense()
    for candidate in _candidates(q):
        if torch.equal(candidate.dense(), wanted):
            yield candidate


def _candidates(q: Quantized) -> Iterator[Quantized]:
    for same in (_microscaling(q), _integers(q)):
        if same is not None and same.grid != q.grid:
            yield same
    base = _integers(q)
    if base is None:
        return
    for bits in dict.fromkeys((base.grid.bits, 4, 5, 8)):  # type: ignore[attr-defined]
        wide = _widened(base, bits)
        if wide is None:
            continue
        yield from _rescaled(wide)
        yield from _blocks(wide)
    symmetric = _centred(base)
    if symmetric is not None:
        yield from _rescaled(symmetric)
        yield from _blocks(symmetric)
        yield from _rows(symmetric)


def _integers(q: Quantized) -> Quantized | None:
    """``q`` on a uniform grid with a scale per row and group; None when it cannot be."""
    grid: Any = q.grid
    if isinstance(grid, Int):
        return q if grid.rows == 1 else None
    if isinstance(grid, Vectorwise):
        like, params = grid.uniform(q.params)
        return replace(q, grid=like, params=params)
    if not isinstance(grid, Block):
        return None
    bits = next((b for table in (_SYMMETRIC, _OFFSET) for b, name in table.items() if name == grid.name), None)
    if bits is None:
        return None
    scale, offset = q.params["d"], q.params.get("m")
    if offset is None:
        return replace(q, grid=Int(bits, _GROUP, symmetric=True), params={"scale": scale})
    zero = torch.round(-offset.float() / scale.float()).nan_to_num(0.0).clamp(0, 2**bits - 1).to(torch.uint8)
    return replace(q, grid=Int(bits, _GROUP), params={"scale": scale, "zero": zero})


def _widened(q: Quantized, bits: int) -> Quantized | None:
    """The same numbers with codes of ``bits`` bits, None when these are fewer."""
    grid: Any = q.grid
    if bits < grid.bits:
        return None
    if bits == grid.bits:
        return q
    wide = replace(grid, bits=bits, narrow=False)
    moved = wide.middle - grid.middle if grid.symmetric else 0
    return replace(q, grid=wide, codes=q.codes + moved)


def _centred(q: Quantized) -> Quantized | None:
    """An affine weight on a symmetric grid of 5 or 8 bits, each code with its zero point taken off."""
    grid: Any = q.grid
    if grid.symmetric:
        return q
    index = grid.index(q.params, q.codes.shape[1])
    distance = q.codes.to(torch.int16) - q.params["zero"].to(torch.int16).index_select(1, index)
    most = max(int(distance.max()) + 1, -int(distance.min()))
    bits = next((b for b in (4, 5, 8) if most <= 2 ** (b - 1)), None)
    if bits is None:
        return None
    params = {k: v for k, v in q.params.items() if k != "zero"}
    middle = 2 ** (bits - 1)
    return replace(q, grid=replace(grid, bits=bits, symmetric=True), codes=(distance + middle).to(torch.uint8),
                   params=params)  # fmt: skip


def _rescaled(q: Quantized) -> Iterator[Quantized]:
    """The same with scales stored in every dtype."""
    grid: Any = q.grid
    for name, dtype in SCALE_DTYPES.items():
        yield replace(q, grid=replace(grid, scale=name), params=q.params | {"scale": q.params["scale"].to(dtype)})


def _blocks(q: Quantized) -> Iterator[Quantized]:
    """The same in GGUF's types of 32 columns."""
    grid: Any = q.grid
    columns = q.codes.shape[1]
    if "g_idx" in q.params or columns % _GROUP or (grid.group != -1 and grid.group % _GROUP):
        return
    index = grid.index(q.params, columns)[::_GROUP]
    d = q.params["scale"].index_select(1, index)
    if grid.symmetric and grid.bits in _SYMMETRIC:
        yield replace(q, grid=Block(_SYMMETRIC[grid.bits]), params={"d": d.half()})
    if grid.bits in _OFFSET:
        zero = grid.zero_points(q.params).index_select(1, index)
        params: Params = {"d": d.half(), "m": (-zero * d.float()).half()}
        yield replace(q, grid=Block(_OFFSET[grid.bits]), params=params)


def _rows(q: Quantized) -> Iterator[Quantized]:
    """LLM.int8()'s rows, which have no code for -128."""
    grid: Any = q.grid
    wide = _widened(q, 8)
    if wide is None or grid.group not in (-1, q.codes.shape[1]) or "g_idx" in q.params or not int(wide.codes.min()):
        return
    scale = q.params["scale"].float()
    near = scale * LARGEST
    for absmax in (near, _next(near, 1), _next(near, -1)):  # times 1/127 must give the scale back
        yield replace(q, grid=Vectorwise(), codes=wide.codes, params={"absmax": absmax})


def _next(x: Tensor, by: int) -> Tensor:
    return torch.nextafter(x, x + by)


def _microscaling(q: Quantized) -> Quantized | None:
    """MXFP4 under its other name."""
    grid: Any = q.grid
    if isinstance(grid, Block) and grid.name == "mxfp4":
        return replace(q, grid=_MX, params={"scale": q.params["d"]})
    if isinstance(grid, Float) and (grid.element, grid.group, grid.rows, grid.scale) == ("e2m1", 32, 1, "e8m0"):
        whole = "g_idx" not in q.params and q.codes.shape[1] % _GROUP == 0
        return replace(q, grid=Block("mxfp4"), params={"d": q.params["scale"]}) if whole else None
    return None
