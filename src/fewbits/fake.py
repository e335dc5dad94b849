"""A linear layer that is trained as its quantized self (LSQ, arXiv 1902.08153; straight-through gradients, 1308.3432).

The forward pass uses the weight that codes and parameters will stand for, to the bit; the gradient passes rounding as
if it were not there. On integer grids steps are learned too (:mod:`fewbits.kernels.fakequant`), and clipped weights get
no gradient. Other grids keep the parameters that they are given; without any they are fitted in every pass. Inputs are
quantized in the same way where that is wanted (:func:`fake_inputs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.activations import Activations, Inputs
from fewbits.grids import Grid, Int, Params
from fewbits.kernels.fakequant import fake_affine
from fewbits.model import get_weight
from fewbits.tensor import Quantized

TERNARY = Int(2, 128, symmetric=True, narrow=True)
"""-1, 0 and 1 times a step (BitNet b1.58, arXiv 2402.17764)."""

TINY = torch.finfo(torch.float32).tiny


class FakeLinear(nn.Module):
    """Stands for nn.Linear and transformers' Conv1D; ``weight`` float32 ``[out, in]`` is the master copy of ``w``.

    On integer grids ``step`` float32 has the shape of the grid's scale; the other ``params`` stay as they are given.
    ``inputs`` says what becomes of the layer's input, None: nothing. Its scale may be a parameter that layers share.
    """

    zero: Tensor

    def __init__(
        self, w: Tensor, bias: Tensor | None, grid: Any, params: Params | None = None, inputs: Inputs | None = None
    ):
        super().__init__()
        self.grid, self.params, self.inputs = grid, params, inputs
        self.out_features, self.in_features = w.shape
        self.weight = nn.Parameter(w)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.step: nn.Parameter | None = None
        if isinstance(grid, Int):
            p = start(w, grid) if params is None else params
            self.step = nn.Parameter(p["scale"].float())
            self.register_buffer("zero", grid.zero_points(p))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.inputs is None else fake_inputs(x, self.inputs)
        return F.linear(x, self.fake().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def fake(self) -> Tensor:
        """The weight as its codes will have it, float32, with gradients for ``weight`` and ``step``."""
        if self.step is None:
            return Straight.apply(self.weight, self.quantized().dense())
        grid: Int = self.grid
        scattered = (self.params or {}).get("g_idx")
        group = grid.group if scattered is None else 1
        s, z = (self._by_row(p, scattered) for p in (self._scale(), self.zero))
        return fake_affine(self.weight, s, z, group, grid.qmin, grid.qmax)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """What :meth:`fake` stands for."""
        w, grid = self.weight.detach(), self.grid
        p = dict(self.params or {})
        if self.step is not None:
            p["scale"] = self._scale().to(grid.dtype)
            p |= {} if grid.symmetric else {"zero": self.zero.to(torch.uint8)}
        elif not p:
            p = grid.fit(w)
        inputs = self.inputs
        if inputs is not None and inputs.scale is not None:
            inputs = replace(inputs, scale=inputs.scale.detach().clamp(min=TINY))
        return Quantized(grid, grid.encode(w, p), p, inputs=inputs)

    def _by_row(self, p: Tensor, scattered: Tensor | None) -> Tensor:
        """A parameter of the scale's shape, one value for each group of each row; for each weight if groups are
        scattered."""
        p = p if scattered is None else p.index_select(1, scattered.long())
        return p if len(p) == self.out_features else p.repeat_interleave(self.out_features // len(p), 0)

    def _scale(self) -> Tensor:
        """The steps as they are stored, with LSQ's factor on the gradient: ``1 / sqrt(weights of a step * Qp)``."""
        assert self.step is not None
        grid: Int = self.grid
        shared = self.weight.numel() / self.step.numel()
        g = (shared * max(grid.qmax - grid.middle, 1)) ** -0.5
        s = self.step * g + (self.step * (1 - g)).detach()
        s = s.clamp(min=torch.finfo(grid.dtype).tiny)
        return s + (s.to(grid.dtype).float() - s).detach()


class Straight(torch.autograd.Function):
    """``value``, with its gradient for ``w``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def fake_inputs(x: Tensor, inputs: Inputs) -> Tensor:
    """``inputs(x)`` with gradients for ``x``, as if rounding were not there. A scale that :func:`learns` gets one too,
    with LSQ's factor, and then what it clips gets none.
    """
    if inputs.scale is None or not learns(inputs.scheme):
        return x + (inputs(x) - x).detach()
    low, top = inputs.scheme.ends
    scale = inputs.scale.clamp(min=TINY)
    g = (x.shape[-1] * top) ** -0.5
    s = scale * g + (scale * (1 - g)).detach()
    codes, _ = replace(inputs, scale=s.detach()).encode(x.detach())
    v = (x / s).clamp(low, top)
    return ((v + (codes - v).detach()) * s).to(x.dtype)


def learns(scheme: Activations) -> bool:
    """Whether one static scale divides the whole tensor."""
    return not scheme.dynamic and scheme.granularity == "tensor"


def start(w: Tensor, grid: Int) -> Params:
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


def replace_linears(model: nn.Module, names: list[str], grid: Grid, inputs: Mapping[str, Inputs]) -> None:
    """Put a FakeLinear in the place of each named layer; those in ``inputs`` quantize what they read."""
    for name in names:
        layer: Any = model.get_submodule(name)
        made = FakeLinear(get_weight(layer).float().clone(), layer.bias, grid, inputs=inputs.get(name))
        model.set_submodule(name, made)
