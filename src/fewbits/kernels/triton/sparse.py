"""Products with single weights given by rows: every program gathers one row's columns from a few tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES, TOKENS = 64, 8


@triton.jit
def rows_of_entries(x, offsets, columns, values, y, M, N, stride, BM: tl.constexpr, BE: tl.constexpr):
    """``y [M, N] = x S.T``, sums in float32, each row's entries in order."""
    n = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    begin, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    rows = x + m.to(tl.int64)[:, None] * stride
    acc = tl.zeros((BM, BE), tl.float32)
    for first in range(begin, end, BE):
        at = first + tl.arange(0, BE)
        k = tl.load(columns + at, mask=at < end, other=0)
        v = tl.load(values + at, mask=at < end, other=0.0).to(tl.float32)
        a = tl.load(rows + k[None, :], mask=(m < M)[:, None] & (at < end)[None, :], other=0.0).to(tl.float32)
        acc += a * v[None, :]
    tl.store(y + m.to(tl.int64) * N + n, tl.sum(acc, 1), mask=m < M)


def sparse_product(x: Tensor, offsets: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``x [M, in]`` with consecutive columns, float32, float16, bfloat16; float32 ``[M, out]``."""
    rows, out = len(x), len(offsets) - 1
    y = torch.empty(rows, out, dtype=torch.float32, device=x.device)
    height = min(triton.next_power_of_2(max(rows, 1)), TOKENS)
    if rows and out:
        rows_of_entries[(out, triton.cdiv(rows, height))](
            x, offsets, columns, values, y, rows, out, x.stride(0), BM=height, BE=ENTRIES, num_warps=1
        )
    return y
