"""Weights that become zero, one row at a time and exactly: Optimal Brain Surgeon and Optimal Brain Damage.

OBS (Hassibi, Stork 1992; row by row: arXiv 2208.11580, section 4): remove the weight with the smallest ``w_q² /
[H⁻¹]_qq``, move the others by ``-w_q / [H⁻¹]_qq · H⁻¹_q``, remove it from the inverse by one Gaussian step, and again.
OBD (LeCun et al. 1989) takes ``H`` for diagonal, which removes the smallest ``H_qq w_q²`` and moves nothing; ``H = I``
is pruning by magnitude. What is left is rounded to nearest; float64; the cost of OBS is O(out · in³): for layers up to
1024 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Grid
from fewbits.solve.exact import LARGEST
from fewbits.solve.prune import Sparsity
from fewbits.split import Split
from fewbits.stats import Stats, loss
from fewbits.tensor import Quantized


@dataclass(frozen=True)
class Surgeon:
    """``sparsity`` is a share of each row (OBD: of the weight), as in 0.5, or 2:4; ``compensate`` false is OBD,
    ``curved`` false takes the identity for ``H``."""

    sparsity: str = "0.5"
    compensate: bool = True
    damp: float = 0.01
    curved: bool = True

    wants_zero = True

    def __post_init__(self) -> None:
        Sparsity.parse(self.sparsity)

    @property
    def needs(self) -> frozenset[str]:
        """The gram matrix, or nothing."""
        return frozenset({"gram"} if self.curved else ())

    def __call__(self, w: Tensor, grid: Grid, stats: Stats | None, split: Split | None = None) -> Quantized:
        """Prune ``w [out, in]``, then round it to ``grid``. Raises RequestError for OBS on wide layers."""
        if stats is None and self.curved:
            raise RequestError("pruning needs the gram matrix of the layer's inputs; calibrate")
        rows, columns = w.shape
        sparsity = Sparsity.parse(self.sparsity)
        eye = torch.eye(columns, dtype=torch.float64, device=w.device)
        H = stats.gram.double() if stats and self.curved else eye
        H = H + self.damp * H.diagonal().mean().clamp(min=1e-30) * eye
        if not self.compensate:
            mask = sparsity.mask(w.double().square() * H.diagonal())
            left = w.masked_fill(mask, 0)
        elif columns > LARGEST:
            raise RequestError(
                f"OBS on {columns} columns would take days; allowed: up to {LARGEST}; use --method sparsegpt"
            )
        else:
            inverse = torch.linalg.inv(H)
            found = [_row(w[r].double(), inverse.clone(), sparsity) for r in range(rows)]
            left, mask = torch.stack([x for x, _ in found]).to(w.dtype), torch.stack([m for _, m in found])
        params = grid.fit(left)
        codes = grid.encode(left, params)
        q = Quantized(grid, codes, params)
        meta = {"loss": float(loss(q.dense().double() - w.double(), H)), "zeros": float(mask.double().mean())}
        return Quantized(grid, codes, params, meta=meta, pruned=True)


def _row(w: Tensor, inverse: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """One row after surgery, and which of its weights are gone."""
    n = len(w)
    gone, room = torch.zeros(n, dtype=torch.bool), torch.full((n // sparsity.m if sparsity.m else 1,), 0)
    room += sparsity.n if sparsity.m else int(sparsity.share * n)
    group = torch.arange(n) // (sparsity.m or n)
    while int(room.sum()):
        free = ~gone & (room[group] > 0)
        q = int(torch.where(free, w.square() / inverse.diagonal(), torch.inf).argmin())
        w = w - w[q] / inverse[q, q] * torch.where(gone, 0, inverse[q])
        gone[q], room[group[q]] = True, room[group[q]] - 1
        w[gone] = 0
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, :], inverse[:, q], inverse[q, q] = 0, 0, 1
    return w, gone
