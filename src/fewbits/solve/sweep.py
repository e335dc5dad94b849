"""The one sweep: round columns in order and let the columns still free absorb the error (GPTQ).

Letters of arXiv 2210.17323 and of the OBS papers: ``W [out, in]`` the weight, ``H`` the Hessian of the layer's
squared output error (here the gram matrix ``Σ x xᵀ``: a factor changes no choice), ``U`` the upper Cholesky factor of
its inverse, ``H⁻¹ = Uᵀ U``. Column ``j`` is rounded to ``q``; ``e = (w_j - q) / U_jj``; every later column ``k``
moves by ``-e U_jk``, which is exactly the OBQ elimination of one coordinate in a fixed order. Then ``Σ e² = tr((Q-W)
H (Q-W)ᵀ)``: the loss comes for free.

The sweep never asks what kind of grid it rounds to: a block of columns is ``grid.feedback``.

GPTAQ (arXiv 2504.02692) also takes back what the quantized layers before have lost: with ``X̃`` the inputs in the
original model it minimises ``‖Q X - W X̃‖²``. Column ``j`` leaves the residual ``w_j (x̃_j - x_j)``, which the columns
after it absorb: ``w_later += w_j P_j``, ``P = α triu(G Uᵀ, 1) U`` with ``G = Σ (x̃ - x) xᵀ`` (sheet letters of section
4). ``w_j`` being the value before rounding, the recursion ``v = w - e Ũ + v P`` (``Ũ`` = ``U`` above its diagonal) is
``v = (w - e Ũ)(I - P)⁻¹``: the same sweep for another weight and another factor, see :func:`absorbing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import FewbitsError, RequestError
from fewbits.grids import Grid, Params, group_index, tied
from fewbits.kernels import one_thread
from fewbits.solve.prune import Pruned, Sparsity
from fewbits.solve.rounding import Plain, rounding
from fewbits.split import Split
from fewbits.stats import Stats
from fewbits.tensor import Quantized

BLOCK = 128


@dataclass(frozen=True)
class Sweep:
    """GPTQ. Parameters of a group come from the weights as they are when the sweep reaches it, or all at once
    (``static``).

    ``order`` is the order of the columns: as they are, or by falling activation energy. With ``order="activation"``
    and on-the-fly groups a group is no longer consecutive columns: the result carries ``g_idx``. ``damp`` is added to
    the diagonal as a fraction of its mean; where the factorisation fails it is tried again in float64, then with ten
    times the damping, and so on. ``meta`` of the result says what was needed. Channels that calibration never saw
    active (dead) are rounded to nearest and take no part in the feedback; the reference code sets their weights to
    zero, which prunes channels on the word of a small sample. ``cross`` is GPTAQ's α, 0 for plain GPTQ; 1 is the
    paper's algorithm, 0.25 its code: the correction over-fits when tokens are few (α and damping hold it). ``mixed``
    solves the layer that makes attention's values for what attention makes of its inputs (``pipeline/mixing.py``).
    """

    damp: float = 0.01
    order: Literal["natural", "activation"] = "natural"
    static: bool = False
    importance: bool = True
    cross: float = 0.0
    sparsity: str = ""
    """SparseGPT: weights that become zero on the way, a share of them ("0.5") or "2:4"."""
    mixed: bool = False

    by_columns = True
    splits = True

    def __post_init__(self) -> None:
        if self.sparsity and Sparsity.parse(self.sparsity).m and self.order != "natural":
            raise RequestError(f"sparsity {self.sparsity} is of consecutive columns; give order: natural")

    @property
    def wants_zero(self) -> bool:
        """Whether zero must be a number of the grid."""
        return bool(self.sparsity)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"} | ({"cross"} if self.cross else set()) | ({"mixed"} if self.mixed else set()))

    @property
    def scatters(self) -> bool:
        """Whether groups of the result are not consecutive columns."""
        return self.order == "activation" and not self.static

    def __call__(self, w: Tensor, grid: Grid, stats: Stats | None, split: Split | None = None) -> Quantized:
        """Quantize ``w [out, in]`` (float32 or float64) on ``grid`` for inputs with ``stats.gram``; what ``split``
        keeps is the residual.
        """
        if stats is None:
            raise RequestError("the sweep needs the gram matrix of the layer's inputs; calibrate, or use Nearest")
        grid = tied(grid, [w])
        perm, U, diagonal, used, dead = self._factored(stats, w.dtype)
        back = torch.argsort(perm)
        columns, free, pivots = w.shape[1], w.index_select(1, perm), U.diagonal()[back]
        if self.cross:
            A, U = self._absorbed(stats, perm, U)
            free = carried(free, A)
        if self.sparsity:
            how: Plain = Pruned(grid, Sparsity.parse(self.sparsity))
        else:
            how = rounding(grid, split, w, pivots, ~dead)
        static = self.static or grid.period == -1 or grid.period >= columns
        importance = diagonal if self.importance else None
        if static:
            params = how.fit(w, importance, pivots, torch.arange(columns))
            index = group_index(columns, segment(grid))[perm]
            codes, loss = sweep(free, U, how, params, index, perm)
        else:
            index = group_index(columns, grid.period)
            codes, params, loss = sweep_groups(free, U, how, diagonal[perm] if self.importance else None, perm)
        if self.order == "activation" and not static:
            params = params | {"g_idx": index[back].int()}
        meta = {"loss": float(loss), "damp": used["damp"], "float64": used["float64"], "dead": float(dead.sum())}
        codes = codes[:, back].contiguous()
        return Quantized(grid, codes, params, how.residual(), meta=meta, pruned=bool(self.sparsity))

    def _factored(self, stats: Stats, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, float], Tensor]:
        """The order of the columns, U in that order, the gram's diagonal, how U came about, and which columns are dead.

        Layers that read the same inputs share them.
        """
        key = ("factor", self.order, self.damp, dtype, stats.gram._version)
        if key not in stats.memo:
            H = stats.gram.to(dtype)
            dead = H.diagonal() <= 0
            diagonal = torch.where(dead, 1, H.diagonal())
            activation = self.order == "activation"
            perm = torch.argsort(diagonal, descending=True, stable=True) if activation else torch.arange(len(H))
            U, used = inverse_factor(H.index_select(0, perm).index_select(1, perm), dead[perm], self.damp)
            stats.memo[key] = perm, U, diagonal, used, dead
        return stats.memo[key]

    def _absorbed(self, stats: Stats, perm: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """What GPTAQ makes of the factor, shared as the factor is."""
        key = ("absorbed", self.order, self.damp, self.cross, U.dtype)
        if key not in stats.memo:
            stats.memo[key] = absorbing(U, self.cross * stats.change[perm][:, perm].to(U.dtype))
        return stats.memo[key]


def sweep(
    w: Tensor, U: Tensor, how: Plain, params: Params, index: Tensor, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All columns with known parameters; column ``c`` belongs to group ``index[c]`` and is the layer's ``order[c]``.
    Returns codes and ``Σ e²``.
    """
    w, codes, loss = w.clone(), [], w.new_zeros(())
    order = torch.arange(w.shape[1]) if order is None else order
    for a in range(0, w.shape[1], BLOCK):
        b = min(a + BLOCK, w.shape[1])
        code, e = how.feedback(w[:, a:b], U[a:b, a:b], params, index[a:b], order[a:b])
        w[:, b:] -= e @ U[a:b, b:]
        codes.append(code)
        loss += e.square().sum(1).sum()
    return torch.cat(codes, 1), loss


def sweep_groups(
    w: Tensor, U: Tensor, how: Plain, importance: Tensor | None, order: Tensor
) -> tuple[Tensor, Params, Tensor]:
    """Group by group: fit each group to the weights as they are when the sweep reaches it, then sweep its columns."""
    w, codes, fitted, loss = w.clone(), [], [], w.new_zeros(())
    pivots, grid = U.diagonal(), how.grid
    for a in range(0, w.shape[1], grid.period):
        b = min(a + grid.period, w.shape[1])
        weight = None if importance is None else importance[a:b]
        params = how.fit(w[:, a:b], weight, pivots[a:b], order[a:b])
        index = group_index(b - a, segment(grid))
        code, e = how.feedback(w[:, a:b], U[a:b, a:b], params, index, order[a:b])
        w[:, b:] -= e @ U[a:b, b:]
        codes.append(code)
        fitted.append(params)
        loss += e.square().sum(1).sum()
    # A parameter without a column axis belongs to the whole tensor.
    params = {k: torch.cat([p[k] for p in fitted], 1) if p0.ndim == 2 else p0 for k, p0 in fitted[0].items()}
    return torch.cat(codes, 1), params, loss


def absorbing(U: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """``I - P`` and the factor whose plain sweep is GPTAQ's, ``Ũ (I - P)⁻¹ + diag U``, for ``U [in, in]`` and
    ``G = α Σ (x̃ - x) xᵀ``; the weight is to be :func:`carried` by the first. The sweep's ``Σ e²`` is then
    ``tr((Q-T) H (Q-T)ᵀ)`` with ``T = W + V P``, ``V`` the weights as they were when each was rounded.

    All three products are of triangles. By blocks that leave their zeros out they need a quarter of the operations of
    whole ones: n³ / 3, 2 n³ / 3 and n³ / 3 for n columns.
    """
    n = len(U)
    T, A, factor = torch.zeros_like(U), torch.zeros_like(U), U.triu(1)
    with one_thread():
        for a in range(0, n, BLOCK):
            b = min(a + BLOCK, n)
            torch.mm(G[:b, a:], U[a:b, a:].T, out=T[:b, a:b])
            T[a:b, a:b].triu_(1)
        for a in range(0, n, BLOCK):
            b = min(a + BLOCK, n)
            A[a:b, a:] = T[a:b, a:] @ -U[a:, a:]
        A.diagonal().add_(1)
        for a in range(0, n, BLOCK):
            b = min(a + BLOCK, n)
            factor[a:b, a:] = carried(factor[a:b, a:], A[a:, a:])
    factor.diagonal().copy_(U.diagonal())
    return A, factor


def carried(w: Tensor, A: Tensor) -> Tensor:
    """``w A⁻¹`` for ``w [rows, n]`` and ``A [n, n]`` upper triangular with ones on its diagonal."""
    with one_thread():
        return torch.linalg.solve_triangular(A, w, upper=True, left=False, unitriangular=True).contiguous()


def segment(grid: Grid) -> int:
    """Columns that share every parameter: the period, unless the grid says that a period is made of finer parts."""
    return int(getattr(grid, "segment", grid.period))


def inverse_factor(H: Tensor, dead: Tensor, damp: float) -> tuple[Tensor, dict[str, float]]:
    """Upper triangular ``U`` with ``(H + λI)⁻¹ = Uᵀ U``; λ is ``damp`` times the mean of the live diagonal.

    One factorisation of the matrix with rows and columns reversed, no explicit inverse: if ``J H J = L Lᵀ`` then
    ``U = J L⁻¹ J``. Where it fails: float64, then damping times ten (never added up), until it exceeds the mean itself.
    """
    live = H.diagonal()[~dead]
    if not len(live):
        return torch.eye(len(H), dtype=H.dtype), {"damp": 0.0, "float64": 0.0}
    if not bool(torch.isfinite(live).all()):
        raise FewbitsError(
            "the activations of this layer are not finite; calibrate with --compute fp32 or check the model's weights"
        )
    mean = live.mean()
    while damp <= 10:
        for dtype in (H.dtype, torch.float64):
            A = H.to(dtype, copy=True)
            A.diagonal().add_(damp * mean.to(dtype))
            A.diagonal()[dead] = mean.to(dtype)
            with one_thread():
                L, failed = torch.linalg.cholesky_ex(A.flip(0, 1))
                if not int(failed) and bool(torch.isfinite(L.diagonal()).all()):
                    U = inverse_lower(L).flip(0, 1).to(H.dtype)
                    return U.contiguous(), {"damp": damp, "float64": float(dtype != H.dtype)}
        damp = max(10 * damp, 1e-4)
    raise FewbitsError("the gram matrix of this layer cannot be factorised at any damping; calibrate with more text")


def inverse_lower(L: Tensor) -> Tensor:
    """``L⁻¹`` of a lower triangle, by halves: a third of the operations of solving for the identity, whose zeros no
    library sees.
    """
    n = len(L)
    if n <= 64:
        return torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype), upper=False)
    h = n // 2
    A, C = inverse_lower(L[:h, :h]), inverse_lower(L[h:, h:])
    below = -(C @ (L[h:, :h] @ A))
    return torch.cat([F.pad(A, (0, n - h)), torch.cat([below, C], 1)])
