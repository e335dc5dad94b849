"""Decoding integers with quantized scales and zero points: ``scale * (code - zero)``, both ``base + step * nibble``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton.tile import fields, shared, widen
from fewbits.kernels.words import PLANES


@triton.jit
def decode(W, n, k0, N, K, SPEC: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``W = (words, nested, scale_base, scale_step, zero_base, zero_step)``, ``SPEC = (group, rows that share a base,
    three widths of planes)``."""
    codes = fields(W[0], n, k0, N, K, SPEC[2], SPEC[3], SPEC[4], BN, BK).to(tl.float32)
    pitch = (K + SPEC[0] - 1) // SPEC[0] * SPEC[0]
    own, inside = shared(n.to(tl.int64) * pitch, k0, K, SPEC[0], SPAN, BK)
    common, _ = shared((n // SPEC[1]).to(tl.int64) * pitch, k0, K, SPEC[0], SPAN, BK)
    inner = (n < N)[:, None] & inside[None, :]
    both = tl.load(W[1] + own, mask=inner, other=0).to(tl.int32)
    scale = tl.load(W[2] + common, mask=inner, other=0.0).to(tl.float32)
    scale += tl.load(W[3] + common, mask=inner, other=0.0).to(tl.float32) * (both & 15).to(tl.float32)
    zero = tl.load(W[4] + common, mask=inner, other=0.0).to(tl.float32)
    zero += tl.load(W[5] + common, mask=inner, other=0.0).to(tl.float32) * (both >> 4).to(tl.float32)
    return (codes - widen(zero, SPAN, BN, BK)) * widen(scale, SPAN, BN, BK)


def arguments(weight: Any) -> tuple[Any, tuple[Tensor | None, ...], tuple[Any, ...], int]:
    """Decoder, tensors, constants, and the largest run of columns with common parameters."""
    planes = (*PLANES[weight.bits], 0, 0)[:3]
    whole = weight.group >= weight.shape[1]
    return decode, weight.tensors, (weight.group, weight.rows, *planes), 0 if whole else weight.group
