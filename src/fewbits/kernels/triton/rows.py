"""Quantizing activations row by row: one program per row finds the largest value, divides and rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def nearest(v):
    """float32 rounded to integers, ties to even, for ``|v| < 2**22``: adding 1.5 * 2**23 leaves no fraction bits."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def e4m3(v):
    """uint8 codes of the nearest E4M3 numbers, ties to even, for ``|v| <= 448``; NaN becomes 0x7F.

    The number whose unit in the last place is that of the result (3 bits below v's exponent, at least 2**-9) rounds v
    as ``nearest`` does; the result divided by 2**8 has the same bits as a half, from bit 7 on.
    """
    exponent = tl.maximum((v.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
    magic = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    rounded = (v + magic) - magic
    half = (rounded * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    code = ((v.to(tl.int32, bitcast=True) >> 24) & 0x80) | ((half >> 7) & 0x7F)
    return tl.where(v == v, code, 0x7F).to(tl.uint8)


@triton.jit
def codes_of_rows(x, codes, scale, K, stride, TOP: tl.constexpr, FLOAT: tl.constexpr, BK: tl.constexpr):
    """``codes [M, K]`` uint8 (the bits of int8 or E4M3), ``scale [M]``; ``TOP`` is the largest code's value."""
    m = tl.program_id(0).to(tl.int64)
    biggest, spoiled = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        v = tl.load(x + m * stride + k, mask=k < K, other=0.0).to(tl.float32)
        biggest = tl.maximum(biggest, tl.abs(v))
        spoiled += v * 0.0  # NaN for what is not finite; maxima would lose it
    s = tl.div_rn(tl.max(biggest, 0), TOP) + tl.sum(spoiled, 0)
    s = tl.where(s == 0.0, 1.0, s)
    tl.store(scale + m, s)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        v = tl.div_rn(tl.load(x + m * stride + k, mask=k < K, other=0.0).to(tl.float32), s)
        v = tl.where(v != v, v, tl.minimum(tl.maximum(v, -TOP), TOP))
        if FLOAT:
            code = e4m3(v)
        else:
            code = tl.where(v == v, nearest(v), 0.0).to(tl.int8).to(tl.uint8, bitcast=True)
        tl.store(codes + m * K + k, code, mask=k < K)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` to codes ``[M, K]`` in ``dtype`` (int8 or float8_e4m3fn) and scale float32 ``[M, 1]``."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    width = min(triton.next_power_of_2(columns), 2048)
    top = 127.0 if dtype == torch.int8 else 448.0
    if rows:
        codes_of_rows[(rows,)](
            x, codes, scale, columns, x.stride(0), TOP=top, FLOAT=dtype != torch.int8, BK=width, num_warps=4
        )
    return codes.view(dtype), scale
