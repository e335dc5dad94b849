"""Coordinate descent on codes, after the sweep: each column again, for the best value given all the others.

QuantEase (arXiv 2309.01885), section 3, from a start that is already good. ``L = tr((Q-W) H (Q-W)ᵀ)`` as a function of
the one column ``k`` is least at ``t_k = w_k - Σ_{m≠k} (q_m - w_m) H_mk / H_kk``, so that its best code is the nearest
to ``t_k``: no step makes ``L`` larger.

A pass over the columns in order is again a sweep. With ``H = D + C D + B D`` (``D`` the diagonal, ``C`` what lies
above it over ``D``, ``B`` what lies below), and ``e = t - q`` the error of the new code, the targets of one pass are
``t = w - (q_old - w) B (I + C)⁻¹ - e ((I + C)⁻¹ - I)``: the weight of the sweep is ``w - (q_old - w) B U`` and its
factor ``U = (I + C)⁻¹``, upper triangular with ones on its diagonal. Parameters stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Grid, group_index
from fewbits.kernels import one_thread
from fewbits.solve.rounding import Plain
from fewbits.solve.sweep import Sweep, segment, sweep
from fewbits.split import Split
from fewbits.stats import Stats, loss
from fewbits.tensor import Quantized


@dataclass(frozen=True)
class Descent:
    """The codes that ``start`` finds, improved by ``passes`` over all columns with the damping that it needed.

    Columns are taken in their natural order. Channels that calibration never saw keep their codes.
    """

    passes: int = 3
    start: Sweep = field(default_factory=lambda: Sweep(order="activation", static=True))

    by_columns = True

    def __post_init__(self) -> None:
        if getattr(self.start, "cross", 0):
            raise RequestError("coordinate descent would undo the correction of GPTAQ; start from a sweep of cross 0")

    @property
    def needs(self) -> frozenset[str]:
        return self.start.needs

    @property
    def damp(self) -> float:
        return self.start.damp

    @property
    def scatters(self) -> bool:
        return self.start.scatters

    def __call__(self, w: Tensor, grid: Grid, stats: Stats | None, split: Split | None = None) -> Quantized:
        """Quantize ``w [out, in]`` on ``grid`` for inputs with ``stats.gram``."""
        if stats is None:
            raise RequestError("coordinate descent needs the gram matrix of the layer's inputs; calibrate")
        q = self.start(w, grid, stats, split)
        H = stats.gram.to(w.dtype, copy=True)
        dead = H.diagonal() <= 0
        if bool(dead.all()):
            return q
        H.diagonal().add_(q.meta["damp"] * H.diagonal()[~dead].mean())
        codes = descend(w if q.residual is None else w - q.residual.dense(), q, H, self.passes)
        codes[:, dead] = q.codes[:, dead]
        found = replace(q, codes=codes)
        return replace(found, meta=dict(q.meta) | {"loss": float(loss(found.dense() - w, stats.gram))})


def descend(w: Tensor, q: Quantized, H: Tensor, passes: int) -> Tensor:
    """The codes of ``q`` after ``passes``; ``H [in, in]`` has a positive diagonal."""
    grid, params = q.grid, q.params
    index = params["g_idx"].long() if "g_idx" in params else group_index(len(H), segment(grid)).to(w.device)
    scaled = H / H.diagonal()
    with one_thread():
        eye = torch.eye(len(H), dtype=H.dtype)
        U = torch.linalg.solve_triangular(scaled.triu(1) + eye, eye, upper=True, unitriangular=True)
        below = scaled.tril(-1) @ U
    codes = q.codes
    for _ in range(passes):
        E = grid.decode(codes, params).to(w.dtype) - w
        codes, _ = sweep(w - E @ below, U, Plain(grid), params, index)
    return codes
