"""A linear layer that is trained as its quantized self (LSQ, arXiv 1902.08153; straight-through gradients, 1308.3432).

The forward pass uses the weight that codes and parameters will stand for, to the bit; the gradient passes rounding as
if it were not there. On integer grids steps are learned too: with ``u = w / s``, ``v = clamp(round(u) + z, Qn, Qp)``,
``w' = (v - z) s``, autograd through a rounding of gradient 1 gives LSQ's gradient of ``s``, and none for clipped
weights. Other grids fit their parameters to the weight in every pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.grids import Grid, Int, spread
from fewbits.model import get_weight
from fewbits.tensor import Quantized

TERNARY = Int(2, 128, symmetric=True, narrow=True)
"""-1, 0 and 1 times a step (BitNet b1.58, arXiv 2402.17764)."""


class FakeLinear(nn.Module):
    """Stands for nn.Linear and transformers' Conv1D; ``weight`` float32 ``[out, in]`` is the master copy.

    On integer grids ``step`` float32 has the shape of the grid's scale, and ``zero``, an integer, stays as fitted.
    """

    zero: Tensor

    def __init__(self, layer: nn.Module, grid: Any):
        super().__init__()
        w = get_weight(layer).float().clone()
        self.grid = grid
        self.out_features, self.in_features = w.shape
        self.weight = nn.Parameter(w)
        bias: Any = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.step: nn.Parameter | None = None
        if isinstance(grid, Int):
            p = start(w, grid)
            self.step = nn.Parameter(p["scale"].float())
            self.register_buffer("zero", grid.zero_points(p))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fake().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def fake(self) -> Tensor:
        """The weight as its codes will have it, float32, with gradients for ``weight`` and ``step``."""
        if self.step is None:
            return self.weight + (self.quantized().dense() - self.weight).detach()
        grid: Int = self.grid
        s = self._spread(self._scale())
        z = self._spread(self.zero)
        v = (_round(self.weight / s) + z).clamp(grid.qmin, grid.qmax)
        return (v - z) * s

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """What :meth:`fake` stands for."""
        w, grid = self.weight.detach(), self.grid
        if self.step is None:
            p = grid.fit(w)
        else:
            p = {"scale": self._scale().to(grid.dtype)}
            p |= {} if grid.symmetric else {"zero": self.zero.to(torch.uint8)}
        return Quantized(grid, grid.encode(w, p), p)

    def _scale(self) -> Tensor:
        """The steps as they are stored, with LSQ's factor on the gradient: ``1 / sqrt(weights of a step * Qp)``."""
        assert self.step is not None
        grid: Int = self.grid
        shared = self.weight.numel() / self.step.numel()
        g = (shared * max(grid.qmax - grid.middle, 1)) ** -0.5
        s = self.step * g + (self.step * (1 - g)).detach()
        s = s.clamp(min=torch.finfo(grid.dtype).tiny)
        return s + (s.to(grid.dtype).float() - s).detach()

    def _spread(self, p: Tensor) -> Tensor:
        index = self.grid.index({"scale": p}, self.in_features)
        return spread(p, index, self.out_features)


def start(w: Tensor, grid: Int) -> dict[str, Tensor]:
    """Parameters to begin with: for three levels the mean of ``|w|`` in a group, else those of the least error."""
    p = replace(grid, ratios=grid.search).fit(w)
    if grid.qmax - grid.qmin > 2:
        return p
    index = grid.index(p, w.shape[1])
    total = torch.zeros(len(w), p["scale"].shape[1]).index_add_(1, index, w.abs())
    count = torch.bincount(index, minlength=total.shape[1])
    if len(p["scale"]) == len(w):
        p["scale"] = (total / count).clamp(min=torch.finfo(grid.dtype).tiny).to(grid.dtype)
    return p


def fake_linears(model: nn.Module) -> dict[str, FakeLinear]:
    """Layers of a model that are trained as their quantized selves, by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeLinear)}


def replace_linears(model: nn.Module, names: list[str], grid: Grid) -> None:
    """Put a FakeLinear in the place of each named layer."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, FakeLinear(getattr(owner, leaf), grid))


def _round(u: Tensor) -> Tensor:
    """Nearest integers, with the gradient of ``u``."""
    return u + (torch.round(u) - u).detach()
