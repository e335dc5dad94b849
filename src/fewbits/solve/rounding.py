"""What the sweep does to a block of columns: fit the grid, round with error feedback, keep single weights beside it.

:class:`Held` is SpQR's part (arXiv 2306.03078, section 4, algorithm 1). A weight is held when its weighted squared
error ``e² = (w - Q(w))² / [H_F⁻¹]_jj`` exceeds a limit: its code stays the nearest one, and what is left goes into a
float16 value beside it; only the rounding of that is fed back. Before a group's parameters are fitted, weights whose
absence would lower the group's error by more than the limit (leave one out) are replaced by the mean of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewbits.grids import Grid, Params
from fewbits.split import Outliers, Split
from fewbits.tensor import Sparse

SCREENED = 32
"""Columns of the largest group that leave-one-out refits as many times."""


class Plain:
    """Everything goes onto the grid."""

    def __init__(self, grid: Grid):
        self.grid = grid

    def fit(self, w: Tensor, importance: Tensor | None, pivots: Tensor, columns: Tensor) -> Params:
        """Parameters for ``w [out, n]``; ``importance`` and the factor's diagonal ``pivots`` ``[n]`` belong to its
        columns, ``columns [n]`` says which they are in the layer's own order.
        """
        return self.grid.fit(w, importance)

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Grid.feedback`."""
        return self.grid.feedback(w, u, p, index)

    def residual(self) -> Sparse | None:
        """What was kept beside the codes, columns in the layer's own order."""
        return None


class Held(Plain):
    """Weights of the bool ``mask [out, in]``, if there is one, else those above ``limit``, at most ``most`` of all."""

    def __init__(self, grid: Grid, shape: torch.Size, mask: Tensor | None, limit: float = math.inf, most: float = 1.0):
        super().__init__(grid)
        self.mask, self.limit, self.left = mask, limit, int(most * shape.numel())
        self.kept = torch.zeros(shape, dtype=torch.float16)

    def fit(self, w: Tensor, importance: Tensor | None, pivots: Tensor, columns: Tensor) -> Params:
        n = w.shape[1]
        group = n if self.grid.period == -1 else self.grid.period
        whole = n - n % group
        parts = [
            self._without(w[:, a:b], group, pivots[a:b], columns[a:b]) for a, b in ((0, whole), (whole, n)) if b > a
        ]
        return self.grid.fit(torch.cat(parts, 1), importance)

    def _without(self, w: Tensor, group: int, pivots: Tensor, columns: Tensor) -> Tensor:
        """``w [out, n]``, in groups of ``group`` columns or one shorter one, without what is likely to be held."""
        rows = w.reshape(-1, min(group, w.shape[1]))  # [out G, group]: groups are fitted alone, so all at once
        if self.mask is not None:
            candidates = self.mask[:, columns].view(rows.shape)
        elif group <= SCREENED and math.isfinite(self.limit):
            each = pivots.expand(w.shape).reshape(rows.shape)
            candidates = leave_one_out(getattr(self.grid, "screen", self.grid), rows, each) > self.limit
        else:
            return w
        return without(rows, candidates).view(w.shape)

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        fused = getattr(self.grid, "keep", None)
        if fused is not None and self.mask is None:
            before = w.clone()
            all_codes, errors, kept = fused(w, u, p, index, self.limit)
            if (count := int(kept.count_nonzero())) <= self.left:
                self.left -= count
                self.kept[:, columns] = kept
                return all_codes, errors
            w.copy_(before)  # too many: the dearest ones of each column, below
        codes, errors = [], torch.empty_like(w)
        for j in range(w.shape[1]):
            column, group = w[:, j : j + 1], p | {"g_idx": index[j : j + 1]}
            code = self.grid.encode(column, group)
            left = (column - self.grid.decode(code, group))[:, 0]
            kept = torch.where(self._held((left / u[j, j]).square(), columns[j]), left, 0).half()
            e = (left - kept.to(w.dtype)) / u[j, j]
            w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
            codes.append(code)
            errors[:, j], self.kept[:, columns[j]] = e, kept
        return torch.cat(codes, 1), errors

    def residual(self) -> Sparse | None:
        return Sparse.of(self.kept)

    def _held(self, cost: Tensor, column: Tensor) -> Tensor:
        if self.mask is not None:
            return self.mask[:, column]
        held = cost > self.limit
        if int(held.sum()) > self.left:
            dearest = cost.topk(self.left).indices
            held = torch.zeros_like(held)
            held[dearest] = True
        self.left -= int(held.sum())
        return held


def rounding(grid: Grid, split: Split | None, w: Tensor, pivots: Tensor, live: Tensor) -> Plain:
    """How the sweep rounds ``w [out, in]`` with what ``split`` keeps; ``pivots`` and ``live`` ``[in]`` in the layer's
    own order.
    """
    if split is None:
        return Plain(grid)
    if isinstance(split, Outliers):
        return Held(grid, w.shape, None, split.limit(w, pivots, live), split.most)
    return Held(grid, w.shape, split.known(w, (1 / pivots.square()).expand(w.shape)))


def leave_one_out(grid: Grid, w: Tensor, pivots: Tensor) -> Tensor:
    """By how much the error ``Σ (Q(w) - w)² / pivots²`` of each row of ``w [rows, n]``, one group, falls without each
    of its weights, its own error counted: of the others it may fall too, since the grid fits them more closely.
    """
    n = w.shape[1]
    if n < 3:
        return torch.zeros_like(w)

    w, pivots = w.float(), pivots.float()

    def errors(fitted: Tensor) -> Tensor:
        p = grid.fit(fitted)
        return ((grid.decode(grid.encode(w, p), p) - w) / pivots).square()

    own = errors(w)
    if getattr(grid, "by_range", False):
        # The grid changes only where the smallest or the largest goes; any other weight spares its own error alone.
        total, gain = own.sum(1, keepdim=True), own.clone()
        for largest in (False, True):
            values, places = w.topk(2, 1, largest=largest)
            at = places[:, :1]
            others = errors(w.scatter(1, at, values[:, 1:])).scatter(1, at, 0)
            gain.scatter_(1, at, total - others.sum(1, keepdim=True))
        return gain
    gains = []
    for k in range(n):
        others = errors(torch.cat([w[:, :k], w[:, k + 1 :]], 1))
        gains.append(own.sum(1) - others.sum(1) + others[:, k])
    return torch.stack(gains, 1)


def without(w: Tensor, mask: Tensor) -> Tensor:
    """``w`` with masked weights replaced by the mean of the others of their row; rows with no others are left alone."""
    left = (~mask).sum(1, keepdim=True)
    mean = w.masked_fill(mask, 0).sum(1, keepdim=True) / left.clamp(min=1)
    return torch.where(mask & (left > 0), mean, w)
