"""Gradients in fixed point: linear layers and attention whose every product, forward and backward, is one of
:mod:`fewbits.kernels.fixed`. No result depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.kernels.fixed import fixed_attention, fixed_cross_, fixed_linear, takes_attention, takes_linear

ROWS = 256
"""Queries whose scores are in memory at once: what lies above causal attention's diagonal is skipped by as many."""


class Turned:
    """``w^T``, in rows, made once for each weight that gradients pass through."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, w: Tensor) -> Tensor:
        if id(w) not in self._made:
            self._made[id(w)] = w, w.t().contiguous()
        return self._made[id(w)][1]


class Linear(torch.autograd.Function):
    """``x w^T + bias``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, turned: Turned) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.turned = turned
        return fixed_linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (for_x, for_w, for_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        of_w = None
        if for_w:
            of_w = torch.zeros_like(w)
            fixed_cross_(of_w, g.flatten(0, -2), x.flatten(0, -2))
        of_x = fixed_linear(g, ctx.turned(w)) if for_x else None
        return of_x, of_w, g.flatten(0, -2).sum(0) if for_bias else None, None


class Attention(torch.autograd.Function):
    """``softmax(scale q k^T) v`` as :func:`fixed_attention`. Backward computes the weights ``P`` again: with ``g`` the
    gradient of the output ``y``, that of the scores is ``S' = P (g v^T - Σ g y)``, and ``v' = P^T g``,
    ``q' = scale S' k``, ``k' = scale S'^T q``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        y = fixed_attention(q, k, v, scale, causal)
        ctx.save_for_backward(q, k, v, y)
        ctx.scale, ctx.causal = scale, causal
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y = ctx.saved_tensors
        B, H, T, D = q.shape
        K = k.shape[1]
        of_q, of_k, of_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        spared = (g * y).sum(-1, keepdim=True)
        # Heads that share keys and values are rows of one product.
        q_, g_, s_, of_q_ = (
            t.view(B, K, H // K, T, t.shape[-1]) for t in (q.contiguous(), g.contiguous(), spared, of_q)
        )
        for b, h in ((b, h) for b in range(B) for h in range(K)):
            keys, values, turned = k[b, h], v[b, h], k[b, h].t().contiguous()
            for first in range(0, T, ROWS):
                rows = slice(first, min(first + ROWS, T))
                seen = rows.stop if ctx.causal else T
                q0, g0, s0 = (t[b, h, :, rows].reshape(-1, t.shape[-1]) for t in (q_, g_, s_))
                scores = fixed_linear(q0, keys[:seen]).mul_(ctx.scale).view(H // K, -1, seen)
                if ctx.causal:
                    late = torch.ones(rows.stop - first, rows.stop - first, dtype=torch.bool).triu(1)
                    scores[..., first:].masked_fill_(late, -torch.inf)
                P = scores.softmax(-1).view(-1, seen)
                fixed_cross_(of_v[b, h, :seen], P, g0)
                S = fixed_linear(g0, values[:seen]).sub_(s0).mul_(P).mul_(ctx.scale)
                of_q_[b, h, :, rows] = fixed_linear(S, turned[:, :seen]).view(H // K, -1, D)
                fixed_cross_(of_k[b, h, :seen], S, q0)
        return of_q, of_k, of_v, None, None


class FixedGradients(TorchFunctionMode):
    """Within it, linear layers and attention of float32 on the CPU, and their gradients, compute in fixed point.

    Weights must not change while it lives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turned = Turned()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and takes_linear(*args, **kwargs):
            return self._linear(*args, **kwargs)
        if func is F.scaled_dot_product_attention and takes_attention(*args, **kwargs):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = Linear.apply(input, weight, bias, self.turned)
        return y


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, scale: float | None = None, **rest: Any
) -> Tensor:
    y: Tensor = Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, is_causal)
    return y
