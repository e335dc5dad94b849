"""``y = (x * sx) @ (w * sw).T + bias`` with both operands in one byte: int8 summed in int32, E4M3 in float32.

Scales that are constant along the columns are applied once, when a tile is stored. Blocks of columns with their own
scales (DeepSeek-V3's 128) are summed apart and scaled in float32, which also bounds the error of tensor cores' sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.gpu import pack_bytes, reference_scaled
from fewbits.kernels.triton import interpreting, native_fp8, tune
from fewbits.kernels.triton.product import FEW, product
from fewbits.kernels.triton.tune import Tiles

COLUMNS = 128
"""Columns of a tile; blocks of columns with their own scales must be a multiple of it."""
ALL = 1 << 30
"""Rows that share the scale of a tensor: more than there are, and the same number whatever their count."""


@triton.jit
def dot(
    x, sx, w, sw, y, bias, M, N, K, stride, xg, wg,
    XROWS: tl.constexpr, WROWS: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scales ``sx [., xg]``, ``sw [., wg]``; ``XROWS`` and ``WROWS`` rows share one; ``GROUP`` columns do, 0: all."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    rows = x + m.to(tl.int64)[:, None] * stride
    columns = w + n.to(tl.int64)[None, :] * K
    px, pw = sx + m // XROWS * xg, sw + n // WROWS * wg
    acc = tl.zeros((BM, BN), ACC)
    for k0 in range(part * share, tl.minimum(K, (part + 1) * share), BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        b = tl.load(columns + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0)
        if ACC == tl.float32:  # noqa: SIM300
            a = a.to(tl.float8e4nv, bitcast=True)
            b = b.to(tl.float8e4nv, bitcast=True)
        if GROUP > 0:
            cx = tl.load(px + tl.minimum(k0 // GROUP, xg - 1), mask=m < M, other=0.0)
            cw = tl.load(pw + tl.minimum(k0 // GROUP, wg - 1), mask=n < N, other=0.0)
            acc += tl.dot(a, b, out_dtype=ACC) * (cx[:, None] * cw[None, :])
        else:
            acc = tl.dot(a, b, acc, out_dtype=ACC)
    where = (m < M)[:, None] & (n < N)[None, :]
    total = acc
    if SPLIT == 1:
        total = acc.to(tl.float32)
        if GROUP == 0:
            total = total * tl.load(px, mask=m < M, other=0.0)[:, None] * tl.load(pw, mask=n < N, other=0.0)[None, :]
        if bias is not None:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    to = y + (part.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=where)


@triton.jit
def few_integers(
    x, sx, w, sw, y, bias, M, N, K, stride,
    XROWS: tl.constexpr, WROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """int8 products of up to ``BM`` rows, without ``tl.dot``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    acc = tl.zeros((BM, BN, BK), tl.int32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * stride + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        inner = (n < N)[:, None] & (k < K)[None, :]
        b = tl.load(w + n.to(tl.int64)[:, None] * K + k[None, :], mask=inner, other=0)
        acc += a.to(tl.int32)[:, None, :] * b.to(tl.int32)[None, :, :]
    total = tl.sum(acc, 2).to(tl.float32)
    cx = tl.load(sx + m // XROWS, mask=m < M, other=0.0)
    cw = tl.load(sw + n // WROWS, mask=n < N, other=0.0)
    total = total * cx[:, None] * cw[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def scaled(x: Tensor, scale: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype, split: int = 0) -> Tensor:
    """``x [M, K]`` int8 or float8_e4m3fn, ``scale [M or 1, 1 or groups]``; the result ``[M, N]`` in ``dtype``."""
    if len(x) == 0:
        return scale.new_empty(0, weight.shape[0], dtype=dtype)
    made = torch.float32 if interpreting() and dtype == torch.bfloat16 else dtype
    integers = x.dtype == torch.int8
    if integers and len(x) <= FEW and not split:
        return _few(x, scale, weight, bias, made).to(dtype)
    if not integers and not native_fp8(x.device):
        return _without_fp8(x, scale, weight, bias, dtype)
    blocks = max(scale.shape[1], weight.scale.shape[1]) > 1
    if blocks and weight.block[1] % COLUMNS:
        return reference_scaled(x, scale, weight, bias, dtype)
    return _dot(x, scale, weight, bias, made, split).to(dtype)


def _few(x: Tensor, scale: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (out, columns), rows = weight.shape, len(x)
    y = scale.new_empty(rows, out, dtype=dtype)
    height = triton.next_power_of_2(rows)

    def launch(t: Tiles) -> None:
        few_integers[(triton.cdiv(out, t.n),)](
            x, scale, weight.codes, weight.scale, y, bias, rows, out, columns, x.stride(0),
            XROWS=ALL if len(scale) == 1 else 1, WROWS=weight.block[0], BM=height, BN=t.n, BK=t.k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    tune.run(("few int8", height, out, columns, dtype), tune.FEW[height], launch, x, None)
    return y


def _dot(x: Tensor, scale: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype, split: int) -> Tensor:
    (out, columns), rows = weight.shape, len(x)
    groups = max(scale.shape[1], weight.scale.shape[1])
    height = tune.height(rows)
    sums = torch.int32 if x.dtype == torch.int8 else torch.float32
    split = split or tune.split(rows, out, columns, x.device)
    a, b = (t if t.dtype == torch.int8 else t.view(torch.uint8) for t in (x, weight.codes))
    y = scale.new_empty(split, rows, out, dtype=dtype if split == 1 else sums)

    def launch(t: Tiles) -> None:
        dot[(triton.cdiv(out, t.n), triton.cdiv(rows, t.m), split)](
            a, scale, b, weight.scale, y, bias, rows, out, columns, x.stride(0),
            scale.shape[1], weight.scale.shape[1],
            XROWS=ALL if len(scale) == 1 else 1, WROWS=weight.block[0], GROUP=weight.block[1] if groups > 1 else 0,
            ACC=tl.int32 if x.dtype == torch.int8 else tl.float32, SPLIT=split, BM=t.m, BN=t.n, BK=COLUMNS,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    tune.run(("dot", x.dtype, groups, height, out, columns, dtype), tune.MANY[height], launch, x, None)
    if split == 1:
        return y[0]
    total = tune.join(y, None).float()
    if groups == 1:
        total = total * scale * _by_row(weight)
    return total if bias is None else total + bias.float()


def _without_fp8(x: Tensor, scale: Tensor, weight: Any, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """E4M3 on GPUs that lack it: codes of both are exact in float16; scales are applied afterwards, in float32."""
    if max(scale.shape[1], weight.scale.shape[1]) > 1:
        return reference_scaled(x, scale, weight, bias, dtype)
    codes = pack_bytes(weight.codes, torch.ones_like(weight.scale[:1]))
    y = product(x.to(torch.float16), codes, None, dtype=torch.float32) * scale * _by_row(weight)
    return (y if bias is None else y + bias.float()).to(dtype)


def _by_row(weight: Any) -> Tensor:
    """Scales ``[R, 1]`` of blocks of rows as ``[1, out]``."""
    return weight.scale[torch.arange(weight.shape[0], device=weight.scale.device) // weight.block[0]].T
