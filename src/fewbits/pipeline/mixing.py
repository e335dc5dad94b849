"""What attention makes of its inputs, for the layer that makes its values.

An error ``E`` of the weights that make values reaches a head's output as ``Σ_t a_st E x_t = E x̄_s`` with ``x̄_s = Σ_t
a_st x_t`` and the head's weights ``a``. So the squared error of what follows is ``tr(E G Eᵀ)`` with ``G = Σ x̄ x̄ᵀ`` over
heads and queries (BoA, arXiv 2406.13474), not with the gram matrix of the inputs, where the first token, which most
heads look at from everywhere, is one of many.

Queries and keys are those of the block's own attention, up to the moment when it would mix values. Of the queries one
in as many as there are heads is kept: as many vectors as tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Mixing:
    """``values`` names the layer of ``block`` that makes values, a part of the attention module.

    Call it between the forward passes of the block, which must be :meth:`watched` then.
    """

    def __init__(self, block: nn.Module, values: str):
        self.attention: Any = block.get_submodule(values.rpartition(".")[0])
        self.told: dict[str, Any] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While entered, what else the attention is told is remembered."""

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.told = {k: v for k, v in kwargs.items() if k != "hidden_states"}

        handle = self.attention.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def __call__(
        self, x: Tensor, steady: Callable[[int], AbstractContextManager[Any]] = lambda n: nullcontext()
    ) -> Tensor | None:
        """``x̄`` for inputs ``x [rows, tokens, in]`` of the newest pass: ``[rows, heads, queries, in]``; None where the
        attention is not torch's. ``steady(n)`` is what products of ``n`` rows are computed in.
        """
        twin = copy.copy(self.attention)  # on the same weights
        twin._modules = {n: _Plain(m) for n, m in self.attention._modules.items()}
        try:
            with _Stop():
                twin.forward(hidden_states=x, **self.told)
        except _Reached as reached:
            with steady(x.shape[1] // reached.query.shape[1]):
                return reached.mixed(x)
        return None


class _Reached(Exception):
    """Attention is about to mix values; carries what it was given, as torch's function names it."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ):
        super().__init__()
        self.query, self.key, self.mask, self.causal = query, key, attn_mask, is_causal
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale

    def mixed(self, x: Tensor) -> Tensor:
        rows, heads, tokens, _ = self.query.shape
        at = torch.arange(min(heads, tokens) - 1, tokens, heads, device=x.device)
        bias = x.new_zeros(len(at), tokens)
        if self.causal:
            bias.masked_fill_(torch.arange(tokens, device=x.device) > at[:, None], -torch.inf)
        out = x.new_empty(rows, heads, len(at), x.shape[-1])
        for r in range(rows):
            inputs = x[r].t().contiguous()
            for h in range(heads):
                key = self.key[r, h * self.key.shape[1] // heads]
                scores = F.linear(self.query[r, h, at] * self.scale, key).float() + self._mask(r, h, at, bias)
                out[r, h] = F.linear(scores.softmax(-1).to(x.dtype), inputs)
        return out

    def _mask(self, row: int, head: int, at: Tensor, bias: Tensor) -> Tensor:
        """What is added to the scores of a head's queries ``at``."""
        if self.mask is None:
            return bias
        mask = self.mask[min(row, len(self.mask) - 1), min(head, self.mask.shape[1] - 1)][at]
        return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


class _Stop(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            raise _Reached(*args, **kwargs or {})
        return func(*args, **kwargs or {})


class _Plain(nn.Module):
    """A part without its hooks."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.forward = layer.forward
