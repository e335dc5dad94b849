"""Refinement of a solved block by gradients: rounding and steps are learned so that the block's *output* is right.

Solvers minimise the error of one layer's output at a time. Here the codes that they found are where a descent on the
whole block begins (AutoRound, arXiv 2309.05516; learned clipping as in OmniQuant, 2308.13137): every weight gets a
continuous place on its grid, within the cell of its code, and moves by the *sign* of its gradient, at a pace that falls
to nothing, by ``reach`` steps of its grid in all. Integer grids move their steps by as large a share. Inputs are those
that the quantized blocks before it give, targets are the outputs of the original block in the original model, so that
a block also learns to take back what earlier ones lost.

The error of a token counts relative to the length of its target: what comes later normalises tokens, and a few of them
are a thousand times as long as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.fake import FakeLinear, Straight, fake_inputs
from fewbits.grids import Int, group_index, spread
from fewbits.plan import Tune
from fewbits.tensor import Quantized

EDGE = 0.49
"""How far from the middle of its cell, in steps, a weight may begin: rounding must give the code it has."""

PROBES = 7
"""Doublings in the search for a neighbour on a grid, from an eighth of the typical step on."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """What a block is tuned on: ``inputs(rows)`` and ``targets(rows)`` give float32 ``[rows, tokens, width]`` for
    indices int64 ``[rows]`` below ``count``.
    """

    count: int
    inputs: Callable[[Tensor], Tensor]
    targets: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Products:
    """What products are computed in: ``within()`` is entered around each pass, forward and backward; ``cross_(C, y,
    x)`` adds ``yᵀ x`` in ``observed``, in an order that no number of threads changes.
    """

    within: Callable[[], AbstractContextManager[Any]]
    cross_: Callable[[Tensor, Tensor, Tensor], None]
    observed: torch.dtype


def tune(
    block: nn.Module,
    forward: Forward,
    solved: Mapping[str, Quantized],
    originals: Mapping[str, Tensor],
    rows: Rows,
    how: Tune,
    products: Products,
    seed: int,
    tell: Callable[[int], None] = lambda step: None,
) -> tuple[dict[str, Quantized], float, float]:
    """``solved`` refined, with the relative squared error of the block's output before and after, over all rows.

    ``forward`` is that of ``block``; ``originals`` are the weights ``[out, in]`` before they were quantized. When the
    error did not fall, ``solved`` itself is returned. ``block`` is as it was afterwards; its weights are not touched.
    ``tell(step)`` counts steps.
    """
    was = {name: block.get_submodule(name) for name in solved}
    wanted = {p: p.requires_grad for p in block.parameters()}
    layers = {name: Layer(was[name], q, originals[name], products) for name, q in solved.items()}
    block.requires_grad_(False)
    for name, layer in layers.items():
        block.set_submodule(name, layer)
    try:
        before = error(forward, rows, how.rows, products)
        curve(forward, layers.values(), rows, how.rows, products, seed)
        for k, chosen in enumerate(order(rows.count, how, seed)):
            descend(forward, rows.inputs(chosen), rows.targets(chosen), products)
            done = k / how.steps
            for layer in layers.values():
                layer.move(2 * how.reach / how.steps * (1 - done), done * len(chosen) / rows.count)
            tell(k + 1)
        after = error(forward, rows, how.rows, products)
    finally:
        for name, module in was.items():
            block.set_submodule(name, module)
        for p, want in wanted.items():
            p.requires_grad_(want)
    if not after < before:
        return dict(solved), before, before
    return {name: layer.found() for name, layer in layers.items()}, before, after


def order(count: int, how: Tune, seed: int) -> list[Tensor]:
    """The rows of each step: all of them in a random order, again and again."""
    generator, rows = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    per_step = min(how.rows, count)
    while len(rows) < how.steps * per_step:
        rows = torch.cat([rows, torch.randperm(count, generator=generator)])
    return list(rows[: how.steps * per_step].split(per_step))


def descend(forward: Forward, x: Tensor, target: Tensor, products: Products) -> None:
    """Leave the gradients of the error on one batch in the parameters, up to a factor."""
    with torch.enable_grad(), products.within():
        y = forward(x)
        y.backward(((y.detach().float() - target) * per_token(target)).to(y.dtype))


def curve(forward: Forward, layers: Collection[Layer], rows: Rows, at_once: int, products: Products, seed: int) -> None:
    """Tell each layer how the error bends as one weight moves: the diagonal of ``Jᵀ J``, ``J`` the derivative of the
    output, over all rows. Sent backwards, random signs ``r`` become ``Jᵀ r`` at a layer's output, whose squares are
    right in the mean (Hutchinson); with inputs ``x`` a weight's part is ``Σ (Jᵀ r)² x²``.
    """
    squares = replace(products, cross_=lambda C, y, x: products.cross_(C, y * y, x * x))
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        layer.products = squares
    for chosen in torch.arange(rows.count).split(at_once):
        target = rows.targets(chosen)
        signs = torch.randint(0, 2, target.shape, generator=generator).mul_(2).sub_(1)
        with torch.enable_grad(), products.within():
            y = forward(rows.inputs(chosen))
            y.backward((signs * per_token(target).sqrt()).to(y.dtype))
    for layer in layers:
        layer.products = products
        layer.bend()


@torch.no_grad()
def error(forward: Forward, rows: Rows, at_once: int, products: Products) -> float:
    """``Σ |y - target|² / |target|²`` of a token, the mean over all tokens."""
    total, tokens = 0.0, 0
    for chosen in torch.arange(rows.count).split(at_once):
        target = rows.targets(chosen)
        with products.within():
            y = forward(rows.inputs(chosen)).float()
        of_token = ((y - target).square() * per_token(target)).sum(-1)
        total += float(of_token.sum(-1).sum())
        tokens += of_token.numel()
    return total / tokens


def per_token(target: Tensor) -> Tensor:
    """``1 / |target|²`` of each token, ``[..., 1]``."""
    return 1 / target.square().sum(-1, keepdim=True).clamp(min=1e-30)


class Layer(FakeLinear):
    """A layer whose codes and steps are tuned. What lies beside the codes stays, and so do weights that were made zero
    on purpose: ``unit``, how far one step moves a weight, is nothing for them.
    """

    def __init__(self, layer: nn.Module, q: Quantized, original: Tensor, products: Products):
        base = q.grid.decode(q.codes, q.params)
        residual = None if q.residual is None else q.residual.dense()
        target = original.float() if residual is None else original.float() - residual
        bias: Any = layer.bias
        unit = step_sizes(q, target)
        if q.pruned:
            unit.masked_fill_(q.zeros(), 0)
        super().__init__(place(q, target, base, unit), bias, q.grid, q.params, q.inputs)
        self.q, self.products, self.unit, self.residual = q, products, unit, residual
        self.curvature: Tensor | None = None
        self.first = None if self.step is None else self.step.detach().clone()
        self.rounded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.inputs is None else fake_inputs(x, self.inputs)
        w = self.fake() if self.residual is None else self.fake() + self.residual
        return Product.apply(x, w, self.bias, self.products)

    def fake(self) -> Tensor:
        """As it is there, but rounded once until weights move: to find codes takes as long as a row's products."""
        if self.step is not None and torch.is_grad_enabled():  # the step's gradient comes through the rounding
            w = super().fake()
            self.rounded = w.detach()
            return w
        if self.rounded is None:
            with torch.no_grad():
                self.rounded = super().fake()
        return Straight.apply(self.weight, self.rounded)

    def bend(self) -> None:
        """Take the gradients that are there for the error's curvature."""
        self.curvature = self.weight.grad
        self.weight.grad = None
        if self.step is not None:
            self.step.grad = None

    @torch.no_grad()
    def move(self, pace: float, hold: float) -> None:
        """One step of descent: ``pace`` steps of the grid against the sign of each gradient; a layer that no token
        reached stays where it is.

        The gradient at the number that a weight is rounded to draws it to an edge of its cell, where it would end on a
        random side: going to the neighbour must lower the error by more than the weight's own curvature takes back.
        ``hold`` times that counts, of all rows. It grows from nothing, so that early on weights also try what pays only
        together with others.
        """
        if self.weight.grad is None or self.curvature is None:
            return
        away = self.weight - self.fake()
        way = self.weight.grad.addcmul_(self.curvature, away, value=hold).sign_().mul_(self.unit)
        self.weight.sub_(way, alpha=pace)
        self.weight.grad = None
        if self.step is not None and self.step.grad is not None and self.first is not None:
            self.step.sub_(self.step.grad.sign_().mul_(self.first), alpha=pace)
            self.step.grad = None
        self.rounded = None

    def found(self) -> Quantized:
        """The codes and steps as they are now."""
        now = self.quantized()
        return replace(self.q, codes=now.codes, params=now.params)


def step_sizes(q: Quantized, w: Tensor) -> Tensor:
    """The distance of each weight's number from its neighbours on the grid, float32 ``[out, in]``: an integer grid's
    step, else the mean of both sides, found by rounding what lies farther and farther away.
    """
    if isinstance(q.grid, Int):
        return spread(q.params["scale"].float(), q.grid.index(q.params, w.shape[1]), len(w)).clone()
    base = q.grid.decode(q.codes, q.params)
    sides = []
    for sign in (1, -1):
        side, away = torch.zeros_like(base), typical(q, w) / 8
        for _ in range(PROBES):
            found = (q.grid.decode(q.grid.encode(base + sign * away, q.params), q.params) - base).abs()
            side = torch.where(side > 0, side, found)
            away *= 2
        sides.append(side)
    up, down = sides
    return torch.where((up > 0) & (down > 0), (up + down) / 2, up + down)


def typical(q: Quantized, w: Tensor) -> Tensor:
    """The step of the uniform grid that would round the weights of a row's period with the same squared error."""
    lost = w - q.grid.decode(q.grid.encode(w, q.params), q.params)
    index = group_index(w.shape[1], q.grid.period)
    total = torch.zeros(len(w), int(index[-1]) + 1).index_add_(1, index, lost.square())
    return (12 * total / torch.bincount(index)).sqrt()[:, index]


def place(q: Quantized, w: Tensor, base: Tensor, unit: Tensor) -> Tensor:
    """Where each weight begins: as near to the original ``w`` as rounding to the code that it has allows."""
    near = torch.minimum(torch.maximum(w, base - EDGE * unit), base + EDGE * unit)
    return torch.where(q.grid.encode(near, q.params) == q.codes, near, base)


class Product(torch.autograd.Function):
    """``x wᵀ + bias`` with gradients for ``x`` and ``w``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, products: Products) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.products = products
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        of_x = of_w = None
        if ctx.needs_input_grad[0]:
            with ctx.products.within():  # a mode does not reach into the backward pass that is called within it
                of_x = F.linear(g, w.t().contiguous())
        if ctx.needs_input_grad[1]:
            of_w = torch.zeros_like(w)
            ctx.products.cross_(of_w, *(t.flatten(0, -2).to(ctx.products.observed) for t in (g, x)))
        return of_x, of_w, None, None
