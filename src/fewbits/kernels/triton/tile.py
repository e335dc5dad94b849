"""What the decoders of all weights share: fields out of words, and parameters spread over the weights that share them.

A tile is ``BN`` rows (``n``, int32 ``[BN]``) by ``BK`` columns from ``k0`` on, both powers of two, ``BK`` at least 32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane(first, blocks, k0, inside, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Fields of ``WIDTH`` bits, int32 ``[BN, BK]``; ``first [BN]`` points to the rows' first words of the plane."""
    PER: tl.constexpr = 32 // WIDTH
    at = k0 // PER + tl.arange(0, BK // PER)
    inner = inside[:, None] & (at < blocks * WIDTH)[None, :]
    w = tl.load(first[:, None] + at[None, :], mask=inner, other=0)
    shift = tl.arange(0, PER) * WIDTH
    return tl.reshape((w[:, :, None] >> shift[None, None, :]) & ((1 << WIDTH) - 1), (BN, BK))


@triton.jit
def fields(words, n, k0, N, K, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Codes, int32 ``[BN, BK]``, laid out as in :mod:`fewbits.kernels.words`, planes of P, Q and R bits (0: none)."""
    blocks = (K + 31) // 32
    first = words + n.to(tl.int64) * (blocks * (P + Q + R))
    codes = plane(first, blocks, k0, n < N, P, BN, BK)
    if Q > 0:
        codes = codes | (plane(first + blocks * P, blocks, k0, n < N, Q, BN, BK) << P)
    if R > 0:
        codes = codes | (plane(first + blocks * (P + Q), blocks, k0, n < N, R, BN, BK) << (P + Q))
    return codes


@triton.jit
def shared(row, k0, K, GROUP: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr):
    """Index ``(row + k) // GROUP`` int64 ``[BN, BK // SPAN]`` of the parameter of every ``SPAN`` columns, and which
    columns exist. ``SPAN`` is a power of two that divides every position where the parameter changes."""
    k = k0 + tl.arange(0, BK // SPAN) * SPAN
    return (row[:, None] + k[None, :]) // GROUP, k < K


@triton.jit
def widen(p, SPAN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``[BN, BK // SPAN]`` to what broadcasts against ``[BN, BK]``."""
    if SPAN < BK:
        p = tl.reshape(tl.broadcast_to(p[:, :, None], (BN, BK // SPAN, SPAN)), (BN, BK))
    return p
