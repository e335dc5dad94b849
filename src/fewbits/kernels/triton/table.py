"""Decoding 4-bit tables: ``table[code] * absmax`` (NF4, FP4), ``absmax`` in float32 or doubly quantized."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton.tile import fields, shared, widen


@triton.jit
def decode(W, n, k0, N, K, SPEC: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``W = (words, absmax, table, maps, outer, offset)``, ``SPEC = (block, rows start new blocks)``."""
    codes = fields(W[0], n, k0, N, K, 4, 0, 0, BN, BK)
    pitch = K
    if SPEC[1]:
        pitch = (K + SPEC[0] - 1) // SPEC[0] * SPEC[0]
    at, inside = shared(n.to(tl.int64) * pitch, k0, K, SPEC[0], SPAN, BK)
    inner = (n < N)[:, None] & inside[None, :]
    if W[3] is None:
        absmax = tl.load(W[1] + at, mask=inner, other=0.0)
    else:
        absmax = tl.load(W[3] + tl.load(W[1] + at, mask=inner, other=0).to(tl.int32))
        absmax = absmax * tl.load(W[4] + at // 256, mask=inner, other=0.0) + tl.load(W[5])
    return tl.load(W[2] + codes) * widen(absmax, SPAN, BN, BK)


def arguments(weight: Any) -> tuple[Any, tuple[Tensor | None, ...], tuple[Any, ...], int]:
    """Decoder, tensors, constants, and the largest run of columns with common parameters."""
    by_row = weight.pitch != weight.shape[1]
    return decode, weight.tensors, (weight.block, by_row), math.gcd(weight.block, weight.pitch)
