"""Products with a quantized weight that never holds all of it dense, and their gradient.

``W [out, in]`` stays as codes; forward and backward dequantize a tile of rows at a time. The graph keeps the layer, not
a weight, so after the forward pass nothing of the dense weight's size is alive. Codes get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewbits.grids import Block, Float, Int, group_index
from fewbits.tensor import Quantized

ROWS = 512
"""Rows of a tile: with 4096 columns in float32 it is 8 MiB."""


class Product(torch.autograd.Function):
    """``x @ W.T`` of a layer with ``product`` and ``product_transposed``; the gradient of ``x`` is ``dy @ W``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product_transposed(dy), None


def product(x: Tensor, tiles: Iterator[tuple[int, int, Tensor]], out: int) -> Tensor:
    """``x @ W.T``, ``[..., out]``, for ``x [..., in]`` and the tiles of ``W`` in its dtype."""
    y = x.new_empty(*x.shape[:-1], out)
    for begin, end, w in tiles:
        y[..., begin:end] = x @ w.t()
    return y


def product_transposed(dy: Tensor, tiles: Iterator[tuple[int, int, Tensor]], columns: int) -> Tensor:
    """``dy @ W``, ``[..., columns]``; 16-bit numbers are summed over tiles in float32."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dx = torch.zeros(*dy.shape[:-1], columns, dtype=wide, device=dy.device)
    for begin, end, w in tiles:
        dx += dy[..., begin:end] @ w
    return dx.to(dy.dtype)


def of_quantized(q: Quantized) -> Iterator[tuple[int, int, Tensor]]:
    """``(begin, end, W[begin:end])`` of ``q``, float32; the last tile is the rest."""
    out = q.shape[0]
    decode = _decoder(q)
    if decode is None:
        yield 0, out, q.dense()
        return
    residual = None if q.residual is None else q.residual.dense()
    for begin in range(0, out, ROWS):
        end = min(begin + ROWS, out)
        w = decode(begin, end)
        yield begin, end, w if residual is None else w + residual[begin:end]


def of_rows(codes: Tensor, scale: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The same of ``codes [out, in] * scale``, one ``[out]`` or ``[1]``."""
    scale = scale.expand(len(codes))
    for begin in range(0, len(codes), ROWS):
        end = min(begin + ROWS, len(codes))
        yield begin, end, codes[begin:end].float() * scale[begin:end, None]


def _decoder(q: Quantized) -> Any:
    """A function ``(begin, end) -> W[begin:end]`` where the grid's parameters can be cut by rows, else None."""
    grid: Any = q.grid
    if isinstance(grid, Int | Float | Block) and all(_cuttable(p, q.shape[0]) for p in q.params.values()):

        def cut(begin: int, end: int) -> Tensor:
            share = {n: _rows(p, q.shape[0], begin, end) for n, p in q.params.items()}
            return grid.decode(q.codes[begin:end], share)

        return cut
    found = grid.looked_up(q.params, q.shape) if hasattr(grid, "looked_up") else None
    if found is None:
        return None
    table, factors = found[0].to(q.codes.device), found[1]
    g_idx = q.params.get("g_idx")
    index = group_index(q.shape[1], grid.period, q.codes.device) if g_idx is None else g_idx.long()
    if factors.shape[1] == 1:
        index = torch.zeros_like(index)
    return lambda begin, end: table[q.codes[begin:end].int()] * factors[begin:end].index_select(1, index)


def _cuttable(p: Tensor, out: int) -> bool:
    """Whether every row has its own value, all rows share one, or ``p`` (``g_idx``) is about columns."""
    return p.ndim == 1 or len(p) in (1, out)


def _rows(p: Tensor, out: int, begin: int, end: int) -> Tensor:
    return p[begin:end] if p.ndim > 1 and len(p) == out > 1 else p
