"""The way back through packed weights: ``dx = dy @ W`` by tiles of dequantized rows, the twin of ``qlinear.matmul``.

Sums are float32. Only one tile of the weight exists at a time, in the same scratch memory as the forward product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewbits.kernels import _table, qlinear
from fewbits.kernels.qlinear import DTYPES, ROWS, TILE_BLOCKS, PackedWeight


def matmul_transposed(dy: Tensor, p: PackedWeight) -> Tensor:
    """``dy @ W`` in dy's dtype: dy float32|bfloat16|float16 ``[..., out]`` on CPU, the result ``[..., in]``."""
    wide = torch.bfloat16 if dy.dtype == torch.bfloat16 and _table.multiplies_bf16() else torch.float32
    out, columns = p.shape
    flat = dy.reshape(-1, out).to(wide)
    dx = torch.empty(len(flat), columns)
    for n, (begin, end, tile) in enumerate(_tiles(p, wide)):
        part = flat[:, begin:end]
        if wide != torch.float32:  # products of bfloat16 are summed in float32 over tiles too
            product = torch.mm(part, tile).float()
            dx = product if n == 0 else dx.add_(product)
        elif n == 0:
            torch.mm(part, tile, out=dx)
        else:
            dx.addmm_(part, tile)
    return dx.view(*dy.shape[:-1], columns).to(dy.dtype)


def rows(p: PackedWeight, begin: int, end: int) -> Tensor:
    """Rows ``begin..end`` of the weight, float32 ``[end - begin, in]``; ``begin`` is a multiple of 16."""
    first, last = begin // ROWS, -(-end // ROWS)
    buffer = torch.empty(p.shape[1], (last - first) * ROWS)
    address, threads = buffer.data_ptr(), torch.get_num_threads()
    p.handle.dequantize(address, buffer.shape[1], first, last, DTYPES[torch.float32], threads)
    return buffer[:, : end - begin].t()


def _tiles(p: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """``(begin, end, W[begin:end])``: each tile is gone when the next one is asked for."""
    out, columns = p.shape
    blocks, step = -(-out // ROWS), TILE_BLOCKS[dtype]
    stride = min(step, blocks) * ROWS + 2 * ROWS  # as in the forward product
    tile = qlinear._scratch(columns * stride, dtype)
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        begin, end = first * ROWS, min(last * ROWS, out)
        p.handle.dequantize(tile.data_ptr(), stride, first, last, DTYPES[dtype], torch.get_num_threads())
        yield begin, end, tile.view(columns, stride)[:, : end - begin].t()
