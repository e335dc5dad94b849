"""``y = x @ W.T + bias`` with any weight: the loops, which know of a weight only how to decode a tile of it.

Few rows: every program owns ``BN`` outputs and adds up products of decoded weights, which costs one pass over the
packed bytes. Many rows: tiles of decoded weights go through ``tl.dot``; where the output has too few tiles to fill
the GPU, the columns are split and the parts added afterwards in a fixed order, so no result depends on timing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.gpu import ByteWeight, IntWeight, LevelsWeight, NestedWeight, TableWeight
from fewbits.kernels.triton import byte, interpreting, ints, levels, nested, table, tune
from fewbits.kernels.triton.tune import Tiles

DECODERS: dict[type, Any] = {
    IntWeight: ints.arguments,
    TableWeight: table.arguments,
    ByteWeight: byte.arguments,
    LevelsWeight: levels.arguments,
    NestedWeight: nested.arguments,
}
FEW = 4
"""Most rows of ``x`` that are multiplied without ``tl.dot``."""
NAMES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def few_rows(
    x, order, y, bias, W, M, N, K, stride,
    DECODE: tl.constexpr, SPEC: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``x [M, K]`` with ``M <= BM``; ``order [K]`` or None is the column of x at each column of the weight."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    acc = tl.zeros((BM, BN, BK), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        at = k
        if order is not None:
            at = tl.load(order + k, mask=k < K, other=0)
        inner = (m < M)[:, None] & (k < K)[None, :]
        a = tl.load(x + m[:, None] * stride + at[None, :], mask=inner, other=0.0).to(tl.float32)
        w = DECODE(W, n, k0, N, K, SPEC, SPAN, BN, BK)
        acc += a[:, None, :] * w[None, :, :]
    total = tl.sum(acc, 2)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    where = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=where)


@triton.jit
def many_rows(
    x, y, bias, W, M, N, K, stride,
    DECODE: tl.constexpr, SPEC: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y [SPLIT, M, N]``: part ``s`` sums the ``s``-th share of the columns; operands of ``tl.dot`` are ``DOT``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    rows = x + m.to(tl.int64)[:, None] * stride
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(part * share, tl.minimum(K, (part + 1) * share), BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w = DECODE(W, n, k0, N, K, SPEC, SPAN, BN, BK)
        acc = tl.dot(a.to(DOT), tl.trans(w.to(DOT)), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    where = (m < M)[:, None] & (n < N)[None, :]
    to = y + (part.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=where)


def product(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    tiles: Tiles | None = None,
    split: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x [M, K]`` with consecutive columns, float32, float16, bfloat16; the result ``[M, N]`` in ``dtype``, else x's.

    ``tiles`` and ``split`` are chosen here unless given.
    """
    dtype = dtype or x.dtype
    if interpreting() and torch.bfloat16 in (dtype, x.dtype):
        # the interpreter holds bfloat16 as integers and cannot calculate with it
        return product(x.float(), weight, bias, tiles, split, torch.float32).to(dtype)
    if len(x) == 0:
        return x.new_empty(0, weight.shape[0], dtype=dtype)
    run = _few if len(x) <= FEW else _many
    return run(x, weight, bias, tiles, split, dtype).to(dtype)


def span_of(run: int, columns: int) -> int:
    """The largest power of two that divides ``run`` (0: the same parameters for all columns), at most ``columns``."""
    return columns if run == 0 else min(run & -run, columns)


def _few(x: Tensor, weight: Any, bias: Tensor | None, tiles: Tiles | None, split: int, dtype: torch.dtype) -> Tensor:
    decoder, tensors, spec, run = DECODERS[type(weight)](weight)
    (out, columns), rows = weight.shape, len(x)
    y = x.new_empty(rows, out, dtype=dtype)
    height = triton.next_power_of_2(rows)

    def launch(t: Tiles) -> None:
        few_rows[(triton.cdiv(out, t.n),)](
            x, getattr(weight, "order", None), y, bias, tensors, rows, out, columns, x.stride(0),
            DECODE=decoder, SPEC=spec, SPAN=span_of(run, t.k), BM=height, BN=t.n, BK=t.k,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    tune.run(("few", decoder.__module__, spec, height, out, columns, x.dtype), tune.FEW[height], launch, x, tiles)
    return y


def _many(x: Tensor, weight: Any, bias: Tensor | None, tiles: Tiles | None, split: int, dtype: torch.dtype) -> Tensor:
    decoder, tensors, spec, run = DECODERS[type(weight)](weight)
    (out, columns), rows = weight.shape, len(x)
    order = getattr(weight, "order", None)
    x = x if order is None else x.index_select(1, order)
    height = tune.height(rows)
    split = split or tune.split(rows, out, columns, x.device)
    y = x.new_empty(split, rows, out, dtype=dtype if split == 1 else torch.float32)

    def launch(t: Tiles) -> None:
        many_rows[(triton.cdiv(out, t.n), triton.cdiv(rows, t.m), split)](
            x, y, bias if split == 1 else None, tensors, rows, out, columns, x.stride(0),
            DECODE=decoder, SPEC=spec, SPAN=span_of(run, t.k), DOT=NAMES[x.dtype], SPLIT=split,
            BM=t.m, BN=t.n, BK=t.k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    tune.run(("many", decoder.__module__, spec, height, out, columns, x.dtype), tune.MANY[height], launch, x, tiles)
    return y[0] if split == 1 else tune.join(y, bias)
