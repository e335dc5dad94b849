"""Nearest codes on a grid fitted to what errors cost the model's loss (SqueezeLLM, arXiv 2306.07629, section 4.1).

The loss of the whole model is expanded to second order around the original weights, with the diagonal of the Fisher
information in place of the Hessian: ``Σ F (w - Q(w))²``, ``F`` the mean over samples of the squared gradient. No
error is fed back, and no activations are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Grid
from fewbits.split import Split
from fewbits.stats import Stats
from fewbits.tensor import Quantized, Sparse


@dataclass(frozen=True)
class Sensitive:
    """SqueezeLLM's solver. Weights that ``split`` keeps count for nothing when the grid is fitted."""

    needs = frozenset({"fisher"})
    splits = True
    by_weight = True
    """Needs a grid that is fitted with an importance of each weight."""

    def __call__(self, w: Tensor, grid: Grid, stats: Stats | None, split: Split | None = None) -> Quantized:
        """Quantize ``w [out, in]`` on ``grid`` with ``stats.fisher [out, in]``."""
        if stats is None or stats.fisher is None:
            raise RequestError("SqueezeLLM needs the Fisher information of the weight; calibrate, or use Nearest")
        F = stats.fisher
        mask = None if split is None else split.known(w, F)
        F = F + 1e-8 * F.mean()  # ties and rows that never had a gradient stay well defined
        if split is not None and mask is None:
            raise RequestError("SqueezeLLM keeps weights that are known beforehand; give split: {kind: largest}")
        if mask is None:
            params = grid.fit(w, F)
            return Quantized(grid, grid.encode(w, params), params)
        dense = w.masked_fill(mask, 0)
        params = grid.fit(dense, F.masked_fill(mask, 0))
        codes = grid.encode(dense, params)
        kept = torch.where(mask, w - grid.decode(codes, params), 0)
        return Quantized(grid, codes, params, Sparse.of(kept))
