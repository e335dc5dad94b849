"""``int8 x int8 -> int32`` matrix products, exact on every machine: the product behind W8A8 layers.

Implementations, the first that is there and fast: our own kernel (:mod:`fewbits.kernels.w8a8`), ``torch._int_mm``, and
the reference: float32 products of at most 1024 columns, whose sums stay below 2**24 and are therefore exact, added up
in int32. ``torch._int_mm`` exists on every CPU but is a plain loop on most (2 GOP/s where float32 reaches 100), so it
is timed once. Sums are exact for up to 131,071 columns.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import _table, w8a8
from fewbits.kernels._table import require, shape
from fewbits.kernels.w8a8 import Packed

EXACT = 1024
"""Columns whose float32 sum is exact: 1024 * 128 * 128 = 2**24."""


def matmul(x: Tensor, w: Packed) -> Tensor:
    """``x @ w.T`` for int8 ``x [T, in]`` and a packed ``w [out, in]``: int32 ``[T, out]``, exact.

    Raises RequestError on other dtypes and shapes.
    """
    require(
        x.dtype == torch.int8 and x.dim() == 2 and x.shape[1] == w.shape[1],
        f"int8_matmul needs x int8[T, {w.shape[1]}] for this weight; got {shape(x)}",
    )
    kind = chosen(x.device.type)
    if kind == "w8a8":
        return w8a8.matmul(x, w)
    dense = w8a8.unpack(w)
    return _int_mm(x, dense) if kind == "torch._int_mm" and len(x) else reference(x, dense)


def reference(x: Tensor, w: Tensor) -> Tensor:
    """The specification, on any device."""
    total = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    for a in range(0, x.shape[1], EXACT):
        part = x[:, a : a + EXACT].float() @ w[:, a : a + EXACT].float().t()
        total += part.to(torch.int32)
    return total


@functools.cache
def chosen(device: str) -> str:
    """Which implementation multiplies on this kind of device: "w8a8", "torch._int_mm" or "reference"."""
    if device == "cpu" and w8a8.available():
        return "w8a8"
    if device == "cuda" or (device == "cpu" and _fast()):
        return "torch._int_mm"
    return "reference"


@functools.cache
def _fast() -> bool:
    """Whether ``torch._int_mm`` beats the reference here by half, on a product of a millisecond."""
    x, w = torch.ones(64, 512, dtype=torch.int8), torch.ones(512, 512, dtype=torch.int8)
    return _seconds(_int_mm, x, w) < 0.5 * _seconds(reference, x, w)


def _seconds(product: Any, x: Tensor, w: Tensor) -> float:
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        product(x, w)
        best = min(best, time.perf_counter() - began)
    return best


def _int_mm(x: Tensor, w: Tensor) -> Tensor:
    """CUDA wants more than 16 rows and multiples of 8: zeros change no sum."""
    if not x.is_cuda:
        return torch._int_mm(x, w.t())
    rows, outs = len(x), len(w)
    pad = -x.shape[1] % 8
    x, w = F.pad(x, (0, pad, 0, max(0, 17 - rows))), F.pad(w, (0, pad, 0, -outs % 8))
    return torch._int_mm(x, w.t())[:rows, :outs]


_table.register(
    "int8_matmul",
    "(x: i8[T,in], w: i8[out,in]) -> i32[T,out], x @ w.T",
    lambda level: f"{chosen('cpu')} for integer products",
)
