"""Decoding a table for each row: ``table[row, code]`` (SqueezeLLM)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton.tile import fields
from fewbits.kernels.words import PLANES


@triton.jit
def decode(W, n, k0, N, K, SPEC: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``W = (words, table)``, ``SPEC`` three widths of planes. Columns past the end decode to a value of the table."""
    codes = fields(W[0], n, k0, N, K, SPEC[0], SPEC[1], SPEC[2], BN, BK)
    row = W[1] + (n.to(tl.int64) << (SPEC[0] + SPEC[1] + SPEC[2]))
    return tl.load(row[:, None] + codes, mask=(n < N)[:, None], other=0.0).to(tl.float32)


def arguments(weight: Any) -> tuple[Any, tuple[Tensor | None, ...], tuple[Any, ...], int]:
    """Decoder, tensors, constants, and the largest run of columns with common parameters."""
    return decode, weight.tensors, (*PLANES[weight.bits], 0, 0)[:3], 0
