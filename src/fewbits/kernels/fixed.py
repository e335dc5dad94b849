"""Products of float32 matrices in fixed point, for processors without bfloat16.

Every run of up to ``DEPTH`` values along the dimension that is summed has one scale and codes of 13 bits; the products
of codes are summed exactly. Rounding is off by at most half a step, 2^-13 of the run's largest value: 16 to 32 times
less than in bfloat16 there, as much for values that many times smaller. AVX2 multiplies twice as many 16-bit integers
as float32 in a cycle (VPMADDWD), so the floor is half the time of a float32 product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.kernels import Sums, _table, reference
from fewbits.kernels._table import register, require, shape
from fewbits.kernels.few import Few, few_linear

DEPTH, MOST = 128, 4095
FEWEST = 32
"""Rows of x from which packing the weight pays."""
FEW = "fewbits_codes"


def _uses(level: str) -> str:
    return "16-bit integer products" if level == "portable" else "AVX2 VPMADDWD"


register("fixed_linear", "(x: f32[T,n], w: f32[m,n], bias: f32[m]|None) -> f32[T,m], x w^T + bias", _uses)
register(
    "fixed_attention",
    "(q: f32[B,H,T,D], k: f32[B,K,T,D], v: f32[B,K,T,D], scale, causal) -> f32[B,H,T,D], softmax(scale q k^T) v",
    _uses,
)
register("fixed_gram_", "(G: f32[n,n], x: f32[T,n]) -> None, G += x^T x", _uses)
register("fixed_cross_", "(C: f32[m,n], y: f32[T,m], x: f32[T,n]) -> None, C += y^T x", _uses)


def fixed_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x w^T + bias`` float32 ``[..., m]`` for ``x [..., n]`` and ``w [m, n]``; runs lie along ``n``.

    NaN or infinity in a run makes everything computed from it NaN; runs below 1e-30 count as zero. The result does not
    depend on the number of threads. Raises RequestError on wrong shapes or dtypes.
    """
    require(
        x.dtype == w.dtype == torch.float32 and w.ndim == 2 and x.ndim >= 1 and x.shape[-1] == w.shape[1],
        f"fixed_linear needs x float32[..., n] and w float32[m, n]; got {shape(x)} and {shape(w)}",
    )
    require(
        bias is None or (bias.dtype == torch.float32 and bias.shape == w.shape[:1]),
        f"bias must be float32[{w.shape[0]}]; got {shape(bias)}",
    )
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    if not _table.native(x, w, bias):
        out = reference.fixed_linear(rows, w, bias)
    else:
        out = x.new_empty(len(rows), len(w))
        rows, w = (t.detach() if t.stride(-1) == 1 else t.detach().contiguous() for t in (rows, w))
        bias = None if bias is None else bias.detach().contiguous()
        addresses = [0 if t is None else t.data_ptr() for t in (out, rows, w, bias)]
        if out.numel() and rows.shape[1]:
            sizes = (len(rows), rows.shape[1], len(w), rows.stride(0), w.stride(0))
            _table.C.fixed_linear(*addresses, *sizes, _table.threads())
        else:
            out.copy_(torch.zeros_like(out) if bias is None else bias.expand_as(out))
    return out.view(*x.shape[:-1], len(w))


def fixed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Tensor:
    """``softmax(scale q k^T) v`` float32 ``[B, H, T, D]`` for ``q [B, H, T, D]`` and ``k``, ``v`` ``[B, K, T, D]``,
    ``K`` a divisor of ``H``; causal attention skips what lies above the diagonal.

    Both products are in fixed point: runs along ``D`` for the scores, along ``T`` for the weighted sum. The result
    does not depend on the number of threads. Raises RequestError on wrong shapes or dtypes.
    """
    require(
        q.ndim == 4
        and k.shape == v.shape == (q.shape[0], k.shape[1], *q.shape[2:])
        and q.shape[1] % k.shape[1] == 0
        and q.dtype == k.dtype == v.dtype == torch.float32,
        f"fixed_attention needs q float32[B, H, T, D] and k, v float32[B, K, T, D]; got {shape(q)} and {shape(k)}",
    )
    if not _table.native(q, k, v) or not q.numel():
        return reference.fixed_attention(q, k, v, scale, causal)
    q, k, v = (t.detach() if t.stride(-1) == 1 else t.detach().contiguous() for t in (q, k, v))
    B, H, T, D = q.shape
    y = q.new_empty(B, T, H, D)
    strides = [t.stride(i) for t in (q, k, v) for i in range(3)]
    addresses = [t.data_ptr() for t in (y, q, k, v)]
    _table.C.fixed_attention(*addresses, [B, H, k.shape[1], T, D], strides, scale, causal, _table.threads())
    return y.transpose(1, 2)


def fixed_gram_(G: Tensor, x: Tensor) -> None:
    """``G += x^T x`` in place, both triangles, exactly symmetric; runs are ``DEPTH`` rows of a column of ``x [T, n]``.

    ``G`` float32 ``[n, n]`` must be symmetric. What is added is the gram matrix of the rounded ``x``, so positive
    semidefinite up to the float32 sums over runs. Raises RequestError on wrong shapes or dtypes.
    """
    n = G.shape[-1]
    require(
        G.dtype == x.dtype == torch.float32 and G.shape == (n, n) and x.ndim == 2 and x.shape[1] == n,
        f"fixed_gram_ needs G float32[n, n] and x float32[T, n]; got {shape(G)} and {shape(x)}",
    )
    x = x.detach()
    if not _table.native(G, x) or not G.is_contiguous():
        reference.fixed_gram_(G, x)
    elif x.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        _table.C.fixed_gram(G.data_ptr(), x.data_ptr(), len(x), n, x.stride(0), _table.threads())


def fixed_cross_(C: Tensor, y: Tensor, x: Tensor) -> None:
    """``C += y^T x`` in place for ``C [m, n]``, ``y [T, m]`` and ``x [T, n]``, each rounded as in :func:`fixed_gram_`.

    Raises RequestError on wrong shapes or dtypes.
    """
    require(
        C.dtype == x.dtype == y.dtype == torch.float32
        and x.ndim == y.ndim == 2
        and len(x) == len(y)
        and C.shape == (y.shape[1], x.shape[1]),
        f"fixed_cross_ needs C float32[m, n], y float32[T, m] and x float32[T, n]; got {shape(C)}, {shape(y)} and "
        f"{shape(x)}",
    )
    y, x = y.detach(), x.detach()
    if not _table.native(C, y, x) or not C.is_contiguous():
        reference.fixed_cross_(C, y, x)
    elif x.numel() and y.numel():
        y, x = (t if t.stride(1) == 1 else t.contiguous() for t in (y, x))
        addresses = (C.data_ptr(), y.data_ptr(), x.data_ptr())
        _table.C.fixed_cross(*addresses, len(x), *C.shape, y.stride(0), x.stride(0), _table.threads())


SUMS = Sums(fixed_gram_, fixed_cross_)


class FixedPoint(TorchFunctionMode):
    """Within it, linear layers and attention of float32 on the CPU compute in fixed point, wherever what torch is asked
    for is one of the products above; gradients are not recorded. A weight whose attribute ``FEW`` holds its codes is
    multiplied in bytes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and takes_linear(*args, **kwargs):
            return _linear(*args, **kwargs)
        if func is F.scaled_dot_product_attention and takes_attention(*args, **kwargs):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _plain(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)


def takes_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return _plain(input, weight, bias) and weight.ndim == 2 and input.shape[:-1].numel() >= FEWEST


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    few: Few | None = getattr(weight, FEW, None)
    return fixed_linear(input, weight, bias) if few is None else few_linear(input, few, bias)


def takes_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    shaped = query.ndim == key.ndim == 4 and key.shape == value.shape == (len(query), key.shape[1], *query.shape[2:])
    heads = shaped and (query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
    return heads and _plain(query, key, value) and attn_mask is None and not dropout_p and query.shape[2] >= FEWEST


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, scale: float | None = None, **rest: Any
) -> Tensor:
    return fixed_attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, is_causal)
