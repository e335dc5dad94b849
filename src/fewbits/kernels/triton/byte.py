"""Decoding one-byte weights: ``code * scale``, FP8 E4M3 on any GPU and int8.

GPUs without E4M3 shift its bits into a half: ``S EEEE MMM`` lands on a half's sign, low exponent and high fraction
bits, and differs from the value by the ratio of the biases, 2**8, for subnormals too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton import native_fp8
from fewbits.kernels.triton.tile import shared, widen


@triton.jit
def halves(byte):
    """float32 values of E4M3 codes given as uint8, every code, NaN too."""
    b = byte.to(tl.int32)
    half = (((b & 0x80) << 8) | ((b & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((b & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def decode(W, n, k0, N, K, SPEC: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``W = (codes, scale)``, ``SPEC = (rows that share a scale, columns that do, kind)``; kind 0 is int8, 1 E4M3 that
    the GPU converts, 2 E4M3 that we do; E4M3 is loaded as uint8, because masked loads fill with an integer."""
    k = k0 + tl.arange(0, BK)
    inner = (n < N)[:, None] & (k < K)[None, :]
    codes = tl.load(W[0] + n.to(tl.int64)[:, None] * K + k[None, :], mask=inner, other=0)
    if SPEC[2] == 1:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif SPEC[2] == 2:
        values = halves(codes)
    else:
        values = codes.to(tl.float32)
    pitch = (K + SPEC[1] - 1) // SPEC[1] * SPEC[1]
    at, inside = shared((n // SPEC[0]).to(tl.int64) * pitch, k0, K, SPEC[1], SPAN, BK)
    scale = tl.load(W[1] + at, mask=(n < N)[:, None] & inside[None, :], other=0.0)
    return values * widen(scale, SPAN, BN, BK)


def arguments(weight: Any) -> tuple[Any, tuple[Tensor | None, ...], tuple[Any, ...], int]:
    """Decoder, tensors, constants, and the largest run of columns with common parameters."""
    rows, columns = weight.block
    integers = weight.codes.dtype == torch.int8
    kind = 0 if integers else 1 if native_fp8(weight.codes.device) else 2
    codes = weight.codes if integers else weight.codes.view(torch.uint8)
    span = 0 if columns >= weight.shape[1] else columns
    return decode, (codes, weight.scale), (rows, columns, kind), span
