"""Optimal Brain Quantization, exactly: eliminate one coordinate of the inverse Hessian at a time, in float64.

arXiv 2208.11580, section 5. For each row: choose the weight whose rounding costs least, ``(w_q - Q(w_q))² /
[H⁻¹]_qq``; round it, move the others by ``-(w_q - Q(w_q)) / [H⁻¹]_qq · H⁻¹_q``; remove it from the inverse by one
Gaussian step. In a fixed order this is the oracle of ``sweep``; greedy it is OBQ. Costs O(out · in³): for small
layers and tests. With ``cross`` it takes GPTAQ's step too (arXiv 2504.02692, section 4): the residual ``w_q (x̃_q -
x_q)`` that the removed weight leaves moves the others by ``α w_q G_q H⁻¹``, ``G = Σ (x̃ - x) xᵀ``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Grid, Params, tied
from fewbits.split import Split
from fewbits.stats import Stats
from fewbits.tensor import Quantized

LARGEST = 1024


@dataclass(frozen=True)
class Exact:
    """OBQ with parameters fitted to the original row; ``greedy=False`` takes the columns in their order. ``cross`` is
    GPTAQ's α, as in the sweep.
    """

    damp: float = 0.01
    greedy: bool = True
    cross: float = 0.0

    by_columns = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "cross"} if self.cross else {"gram"})

    def __call__(self, w: Tensor, grid: Grid, stats: Stats | None, split: Split | None = None) -> Quantized:
        """Quantize ``w [out, in]``, ``in`` at most 1024. Raises RequestError for wider layers."""
        rows, columns = w.shape
        if columns > LARGEST:
            raise RequestError(
                f"exact OBQ on {columns} columns would take days; allowed: up to {LARGEST}; use --method gptq"
            )
        if stats is None:
            raise RequestError("OBQ needs the gram matrix of the layer's inputs; calibrate, or use Nearest")
        H = stats.gram.double()
        dead = H.diagonal() <= 0
        w = w.double()
        live = H.diagonal()[~dead]
        mean = live.mean() if len(live) else torch.ones((), dtype=torch.float64)
        H = H + self.damp * mean * torch.eye(columns, dtype=torch.float64)
        H.diagonal()[dead] = mean
        grid = tied(grid, [w])
        params = grid.fit(w.float())
        if uneven := [k for k, v in params.items() if k != "g_idx" and rows % len(v)]:
            raise RequestError(f"{uneven[0]} is shared by uneven numbers of rows; exact OBQ wants as many for each")
        real = {k: v.double() if v.is_floating_point() else v for k, v in params.items()}
        Hinv = torch.linalg.inv(H)
        G = self.cross * stats.change.double() if self.cross else None
        codes = [self._row(w[r], Hinv.clone(), grid, _row_params(real, r, rows), G) for r in range(rows)]
        return Quantized(
            grid, torch.stack([c for c, _ in codes]), params, meta={"loss": float(sum(e for _, e in codes))}
        )

    def _row(
        self, w: Tensor, Hinv: Tensor, grid: Grid, params: Params, G: Tensor | None = None
    ) -> tuple[Tensor, float]:
        w, n, loss = w.clone(), len(w), 0.0
        left = torch.ones(n, dtype=torch.bool)
        codes = grid.encode(w[None], params)[0]
        ends = [grid.decode(grid.encode(torch.full_like(w, x)[None], params), params)[0] for x in (-1e30, 1e30)]
        margin = (ends[1] - ends[0]) / (2 * (grid.levels - 1)) * (1 + 1e-9)
        for step in range(n):
            now = grid.encode(w[None], params)
            error = w - grid.decode(now, params)[0]
            score = torch.where(left, error**2 / Hinv.diagonal(), torch.inf)
            j = int(_urgent(error, left, margin, score)) if self.greedy else step
            codes[j], loss, was = now[0, j], loss + float(score[j]), float(w[j])
            w -= error[j] / Hinv[j, j] * torch.where(left, Hinv[j], 0)
            left[j] = False
            Hinv = Hinv - torch.outer(Hinv[:, j], Hinv[j]) / Hinv[j, j]
            Hinv[j, :], Hinv[:, j], Hinv[j, j] = 0, 0, 1
            if G is not None:
                w += was * torch.where(left, torch.where(left, G[j], 0) @ Hinv, 0)
        return codes, loss


def _urgent(error: Tensor, left: Tensor, margin: Tensor, score: Tensor) -> Tensor:
    """The cheapest weight, unless compensation has pushed one off the grid: then that one, before it gets worse
    (section 5).
    """
    off = left & (error.abs() > margin)
    return torch.where(off, error.abs(), -1).argmax() if bool(off.any()) else score.argmin()


def _row_params(params: Params, row: int, rows: int) -> Params:
    """The parameters of one row; ``g_idx`` belongs to all of them."""
    return {k: v if k == "g_idx" else v[row * v.shape[0] // rows][None] for k, v in params.items()}
