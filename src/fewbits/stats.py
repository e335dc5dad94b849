"""What calibration leaves of a layer's inputs: a commutative monoid over batches.

With inputs ``x_t [in]`` the gram matrix is ``G = Σ_t x_t x_tᵀ`` (sheet letters: ``H = 2G``; the factor changes no
choice). Adding is exact in any order up to float32 rounding; within a run batches are added in one fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits import kernels
from fewbits.activations import BINS, histogram
from fewbits.errors import RequestError

T = TypeVar("T")


@dataclass
class Stats:
    """Sums over ``count`` tokens, float32: ``gram [in, in]``; ``abssum [in]`` and ``absmax [in]`` unless left out.

    ``histogram`` int64 ``[BINS]`` counts magnitudes over all channels, when it was asked for. ``cross [in, in]`` is
    ``Σ (x̃_t - x_t) x_tᵀ`` over ``paired`` of the tokens, with ``x̃`` the inputs of the same layer in the original model
    (GPTAQ); not symmetric.
    ``mixed`` are the statistics of what attention makes of the inputs, for the layer that makes its values.
    ``fisher [out, in]`` belongs to one weight, not to the inputs: the mean squared gradient of the model's loss.
    """

    gram: Tensor
    abssum: Tensor | None
    absmax: Tensor | None
    count: int = 0
    histogram: Tensor | None = None
    cross: Tensor | None = None
    paired: int = 0
    fisher: Tensor | None = None
    mixed: Stats | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What solvers made of these sums, for the next layer with the same inputs; forgotten when the sums change."""

    @classmethod
    def empty(cls, columns: int, needs: frozenset[str] = frozenset({"gram", "abs"})) -> Stats:
        """Nothing observed yet. The gram matrix is always gathered; "abs", "histogram", "cross" when in ``needs``."""
        magnitudes = "abs" in needs
        return cls(
            torch.zeros(columns, columns),
            torch.zeros(columns) if magnitudes else None,
            torch.zeros(columns) if magnitudes else None,
            histogram=torch.zeros(BINS, dtype=torch.int64) if "histogram" in needs else None,
            cross=torch.zeros(columns, columns) if "cross" in needs else None,
        )

    @classmethod
    def nothing(cls) -> Stats:
        """Of no input at all: what a weight's own statistics are added to."""
        return cls(torch.zeros(0, 0), None, None)

    def update(
        self,
        x: Tensor,
        sums: kernels.Sums = kernels.SUMS,
        original: Tensor | None = None,
        mixed: Tensor | None = None,
        mixed_original: Tensor | None = None,
    ) -> None:
        """Add a batch ``x [..., in]``, in place, by ``sums``; the default ones multiply bfloat16 exactly and add in
        float32. ``mixed [..., in]`` of the same dtype is what attention makes of the batch, ``mixed_original`` what it
        makes of ``original``.

        ``original`` of the shape of ``x``, token for token: what the layer sees in the original model, where "cross" is
        gathered from this batch. Raises RequestError when the shapes differ.
        """
        self._add(x, sums, original)
        if mixed is not None:
            if self.mixed is None:
                self.mixed = Stats.empty(len(self.gram), frozenset({"cross"} if self.cross is not None else ()))
            self.mixed._add(mixed, sums, mixed_original)

    def _add(self, x: Tensor, sums: kernels.Sums, original: Tensor | None) -> None:
        if self.cross is not None and original is not None:
            if original.shape != x.shape:
                raise RequestError(
                    "cross statistics pair each token with the same one in the original model; "
                    f"got {list(x.shape)} and {list(original.shape)}"
                )
            self.paired += x[..., 0].numel()
            change = (original.float() - x.float()).to(x.dtype)
            sums.cross_(self.cross, change.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
        x = x.reshape(-1, x.shape[-1])
        self.memo.clear()
        sums.gram_(self.gram, x)
        self.count += len(x)
        if self.abssum is not None and self.absmax is not None and len(x):
            a = x.abs().float()
            self.abssum += a.sum(0)
            self.absmax = torch.maximum(self.absmax, a.amax(0))
        if self.histogram is not None:
            self.histogram += histogram(x)

    def __add__(self, other: Stats) -> Stats:
        def both(f: Callable[[T, T], T], a: T | None, b: T | None) -> T | None:
            return None if a is None or b is None else f(a, b)

        return Stats(
            self.gram + other.gram,
            both(torch.add, self.abssum, other.abssum),
            both(torch.maximum, self.absmax, other.absmax),
            self.count + other.count,
            both(torch.add, self.histogram, other.histogram),
            both(torch.add, self.cross, other.cross),
            self.paired + other.paired,
            mixed=both(Stats.__add__, self.mixed, other.mixed),
        )

    def of_values(self) -> Stats:
        """What the layer that makes attention's values is solved for: sums of ``mixed``, where it was gathered."""
        return self if self.mixed is None else replace(self, gram=self.mixed.gram, cross=self.mixed.cross, memo={})

    @property
    def change(self) -> Tensor:
        """``Σ (x̃ - x) xᵀ`` over all tokens, as the paired ones tell it. Raises RequestError when there are none."""
        if self.cross is None or (self.count and not self.paired):
            raise RequestError(
                "GPTAQ needs cross statistics; gather them with needs={'gram', 'cross'}, or set cross to 0"
            )
        return self.cross if self.paired == self.count else self.cross * (self.count / self.paired)

    @property
    def absmean(self) -> Tensor:
        """Mean absolute value per channel, float32 ``[in]``. Raises RequestError when magnitudes were not gathered."""
        if self.abssum is None:
            raise RequestError("these statistics hold no magnitudes; gather them with needs={'gram', 'abs'}")
        return self.abssum / max(self.count, 1)

    def finite(self) -> bool:
        """Whether every sum is finite."""
        return bool(torch.isfinite(self.gram.diagonal()).all())

    def scaled(self, s: Tensor) -> Stats:
        """The statistics of ``x * s``: what a diagonal map does to them without a second forward pass.

        A histogram over all channels cannot follow a map of each: it is dropped.
        """
        a = s.abs()
        abssum, absmax = (None if t is None else t * a for t in (self.abssum, self.absmax))
        gram, cross = (None if t is None else t * s[:, None] * s for t in (self.gram, self.cross))
        mixed = None if self.mixed is None else self.mixed.scaled(s)
        assert gram is not None
        return Stats(gram, abssum, absmax, self.count, cross=cross, paired=self.paired, mixed=mixed)


def loss(error: Tensor, gram: Tensor) -> Tensor:
    """``tr(E G Eᵀ)`` for an error ``E [out, in]`` of the weights, ``G`` symmetric: the squared error of the layer's
    output. Where products are in fixed point so is this: right to 2 % where one channel is 1000 times the others.
    """
    return (F.linear(error, gram) * error).sum(1).sum()  # by rows: a flat sum depends on the number of threads
