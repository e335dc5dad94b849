"""Weights that become zero, chosen while sweeping (SparseGPT, arXiv 2301.00774) or beforehand (OBD).

Removing a weight is rounding it to zero: the sweep feeds the error back as it does any other. Which ones: those with
the smallest ``w² / U_jj²`` (``U_jj² = [H_F⁻¹]_jj``, ``w`` as compensated so far), the cost of a zero there (OBS,
Hassibi and Stork 1992), a ``share`` of each block of columns, or ``n`` of every ``m`` consecutive ones in each row.
OBD (LeCun et al. 1989) takes ``H`` for diagonal: the smallest ``H_jj w²`` of the whole weight go, and nothing
compensates.

What is left is rounded to the grid in the same step, which costs nothing more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Grid, Params
from fewbits.solve.rounding import Plain


@dataclass(frozen=True)
class Sparsity:
    """A ``share`` of the weights, or ``n`` of every ``m`` consecutive columns."""

    share: float = 0.0
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """``0.5`` or ``2:4``. Raises RequestError for anything else."""
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = map(int, found.groups())
            if 0 < n < m:
                return cls(n=n, m=m)
        elif re.fullmatch(r"0?\.\d+|0", text):
            return cls(share=float(text))
        raise RequestError(f"sparsity {text!r} is not possible; give a share below 1, as in 0.5, or 2:4")

    def mask(self, score: Tensor) -> Tensor:
        """bool like ``score [out, n]``: the smallest, exactly as many as the share says; ties by place."""
        if self.m:
            groups = score.reshape(len(score), -1, self.m)
            chosen = groups.argsort(dim=-1, stable=True)[..., : self.n]
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True).view(score.shape)
        flat = torch.zeros(score.numel(), dtype=torch.bool)
        flat[score.reshape(-1).argsort(stable=True)[: int(self.share * score.numel())]] = True
        return flat.view(score.shape)


class Pruned(Plain):
    """The sweep's blocks with zeros in them. ``m`` must divide the columns, which come in their natural order."""

    def __init__(self, grid: Grid, sparsity: Sparsity):
        super().__init__(grid)
        self.sparsity = sparsity

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        width, codes, errors = w.shape[1], [], torch.empty_like(w)
        step = self.sparsity.m or width
        mask = torch.zeros(0)
        for j in range(width):
            if j % step == 0:
                some = slice(j, min(j + step, width))
                mask = self.sparsity.mask((w[:, some] / u.diagonal()[some]).square())
            column, group = w[:, j : j + 1], p | {"g_idx": index[j : j + 1]}
            code = self.grid.encode(column.masked_fill(mask[:, j % step, None], 0), group)
            e = (column - self.grid.decode(code, group)) / u[j, j]
            w[:, j + 1 :] -= e * u[j, j + 1 :]
            codes.append(code)
            errors[:, j : j + 1] = e
        return torch.cat(codes, 1), errors


def holds_zero(grid: Grid) -> bool:
    """Whether zero is a number of the grid, whatever its parameters."""
    w = torch.tensor([[-1.0, 0.3, 0.6, 2.0]])
    try:
        p = grid.fit(w)
        return not bool(grid.decode(grid.encode(torch.zeros(1, 4), p), p).any())
    except (RequestError, RuntimeError):
        return False


def uneven(sparsity: str, columns: int, period: int) -> str | None:
    """Why ``n:m`` does not fit a layer of so many columns in groups of ``period``; None when it does."""
    m = Sparsity.parse(sparsity).m
    if m and (columns % m or (period != -1 and period % m)):
        return f"sparsity {sparsity} wants columns and group size in multiples of {m}; they are {columns} and {period}"
    return None
