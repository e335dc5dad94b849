"""Decoding uniform integers: ``scale * (code - zero)``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton.tile import fields, shared, widen
from fewbits.kernels.words import PLANES


@triton.jit
def decode(W, n, k0, N, K, SPEC: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``W = (words, scale, zero or None)``, ``SPEC = (group, three widths of planes)``."""
    codes = fields(W[0], n, k0, N, K, SPEC[1], SPEC[2], SPEC[3], BN, BK).to(tl.float32)
    pitch = (K + SPEC[0] - 1) // SPEC[0] * SPEC[0]
    at, inside = shared(n.to(tl.int64) * pitch, k0, K, SPEC[0], SPAN, BK)
    inner = (n < N)[:, None] & inside[None, :]
    scale = widen(tl.load(W[1] + at, mask=inner, other=0.0).to(tl.float32), SPAN, BN, BK)
    if W[2] is None:
        zero = 1 << (SPEC[1] + SPEC[2] + SPEC[3] - 1)
    else:
        zero = widen(tl.load(W[2] + at, mask=inner, other=0).to(tl.float32), SPAN, BN, BK)
    return (codes - zero) * scale


def arguments(weight: Any) -> tuple[Any, tuple[Tensor | None, ...], tuple[Any, ...], int]:
    """Decoder, tensors, constants, and the largest run of columns with common parameters."""
    planes = (*PLANES[weight.bits], 0, 0)[:3]
    whole = weight.group >= weight.shape[1]
    return decode, weight.tensors[:3], (weight.group, *planes), 0 if whole else weight.group
