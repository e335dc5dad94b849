"""Exact int8 products: ``y = x @ w.T`` in int32, the arithmetic of layers whose weights and activations are int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels import _table

_C: Any = _table.C

_table.register(
    "w8a8",
    "(x i8[T,K], packed w i8[N,K]) -> i32[T,N], x w^T modulo 2^32",
    lambda level: {"portable": "baseline vectors", "avx2": "AVX2 products of int16 pairs"}.get(level, "AVX-512 VNNI"),
)


@dataclass(frozen=True)
class Packed:
    """A weight int8 ``[out, in]`` in the kernels' order: ``data`` ``[blocks, quads, 16, 4]``, int32 sums of rows."""

    shape: tuple[int, int]
    data: Tensor
    sums: Tensor


def available() -> bool:
    """Whether the C++ kernels are built and not switched off by ``FEWBITS_KERNELS=reference``."""
    return _C is not None and hasattr(_C, "w8a8_product")


def pack(w: Tensor) -> Packed:
    """The weight int8 ``[out, in]`` for any number of products. Raises RequestError on other dtypes or shapes."""
    _table.require(w.ndim == 2 and w.dtype == torch.int8, f"w8a8 needs w int8[N, K]; got {_table.shape(w)}")
    out, columns = w.shape
    if not available() or w.device.type != "cpu":
        return Packed((out, columns), w, w.sum(1, dtype=torch.int32))
    blocks, quads = -(-out // 16), -(-columns // 4)
    data, sums = torch.empty(blocks, quads, 16, 4, dtype=torch.int8), torch.empty(blocks * 16, dtype=torch.int32)
    w = w.contiguous()
    _C.w8a8_pack(w.data_ptr(), data.data_ptr(), sums.data_ptr(), out, columns, _table.threads())
    return Packed((out, columns), data, sums)


def unpack(p: Packed, columns: Tensor | None = None) -> Tensor:
    """The weight int8 ``[out, in]`` again, or the given ``columns`` of it (int64 ``[n]``)."""
    if p.data.ndim == 2:
        return p.data if columns is None else p.data[:, columns]
    out, inputs = p.shape
    if columns is None:
        return p.data.transpose(1, 2).reshape(len(p.data) * 16, -1)[:out, :inputs].contiguous()
    chosen = p.data[:, columns // 4, :, columns % 4]  # [columns, blocks, 16]
    return chosen.permute(1, 2, 0).reshape(len(p.data) * 16, len(columns))[:out]


def matmul(x: Tensor, w: Packed | Tensor) -> Tensor:
    """``x @ w.T`` int32 ``[..., out]`` of x int8 ``[..., in]``; exact while sums stay below 2^31 (in < 131072).

    Raises RequestError on other dtypes or shapes.
    """
    w = pack(w) if isinstance(w, Tensor) else w
    out, columns = w.shape
    _table.require(
        x.dtype == torch.int8 and x.shape[-1] == columns,
        f"w8a8 needs x int8[..., {columns}] for this weight; got {_table.shape(x)}",
    )
    if w.data.ndim == 2:
        return reference_matmul(x, w.data)
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], out, dtype=torch.int32)
    rows = x.numel() // columns if columns else 0
    weight = (w.data.data_ptr(), w.sums.data_ptr(), out, columns)
    _C.w8a8_product(*weight, x.data_ptr(), rows, y.data_ptr(), _table.threads())
    return y


def reference_matmul(x: Tensor, w: Tensor) -> Tensor:
    """The specification of :func:`matmul`; float64 holds these sums exactly."""
    return (x.double() @ w.double().T).to(torch.int64).to(torch.int32)
