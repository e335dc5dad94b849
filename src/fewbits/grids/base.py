"""What a grid is: which numbers exist, and which weights share parameters.

A weight is a matrix ``[out, in]`` (rows are output channels). A grid is frozen data, hashable, and holds no tensors;
what ``fit`` finds is a dictionary of tensors, *Params*. **The shape of a parameter says who shares it**: a scale of
shape ``[out, groups]`` is per group, ``[out, 1]`` per row, ``[1, 1]`` per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Params = dict[str, Tensor]


@runtime_checkable
class Grid(Protocol):
    """Which numbers exist. Implementations are frozen dataclasses."""

    @property
    def width(self) -> int:
        """Columns coded together: 1 for scalars."""
        ...

    @property
    def levels(self) -> int:
        """Number of codes."""
        ...

    @property
    def period(self) -> int:
        """Columns after which parameters are complete; -1 means the whole row."""
        ...

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Parameters for ``w [out, in]`` that minimise the error weighted by ``importance [in]``."""
        ...

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes of ``w``."""
        ...

    def decode(self, codes: Tensor, p: Params) -> Tensor:
        """Values of ``codes``, float32 ``[out, in]``."""
        ...

    def feedback(self, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
        """Round the columns of ``w [out, b]`` in order with error feedback inside the block, in place (arXiv
        2210.17323, eq. 4).

        ``u [b, b]`` is the upper triangular block of the factor; column ``c`` uses the parameters of group
        ``index[c]``. Returns codes and the scaled errors ``e [out, b]`` with ``w_later -= e @ u_later`` left to the
        caller.
        """
        ...

    def cost(self, shape: tuple[int, int]) -> float:
        """Exact bits per weight for a matrix of this shape, every parameter counted."""
        ...

    # A grid may also have ``settle(params) -> Params``: parameters as they are stored, applied once by Quantized, when
    # all codes are chosen; ``inseparable(shape) -> str | None``: why columns cannot be rounded one at a time; ``keep``:
    # ``feedback`` that leaves dear weights beside the codes; and ``by_range``: whether parameters follow from the
    # smallest and the largest weight of a group alone.


def feedback(grid: Grid, w: Tensor, u: Tensor, p: Params, index: Tensor) -> tuple[Tensor, Tensor]:
    """:meth:`Grid.feedback` for any scalar grid, column by column: the specification of the fused kernels."""
    codes, errors = [], []
    for j in range(w.shape[1]):
        column, group = w[:, j : j + 1], p | {"g_idx": index[j : j + 1]}
        code = grid.encode(column, group)
        e = (column - grid.decode(code, group)) / u[j, j]
        w[:, j + 1 :] -= e * u[j, j + 1 :]
        codes.append(code)
        errors.append(e)
    return torch.cat(codes, 1), torch.cat(errors, 1)


def tied(grid: Any, weights: Sequence[Tensor]) -> Any:
    """``grid`` with what ``weights`` share beyond their own parameters settled: NVFP4's ``global``, one for all members
    that servers fuse into one matrix. Grids without a method ``tied`` have nothing to settle.
    """
    settle = getattr(grid, "tied", None)
    return grid if settle is None else settle(weights)


def groups_of(columns: int, group: int) -> int:
    """Number of groups along ``columns``; the last one may be short. ``group`` -1 is the whole row."""
    return 1 if group == -1 else -(-columns // group)


def group_index(columns: int, group: int, device: torch.device | None = None) -> Tensor:
    """int64 ``[columns]``: the group of each column when groups are consecutive."""
    return torch.arange(columns, device=device) // (columns if group == -1 else group)


def spread(p: Tensor, index: Tensor, rows: int) -> Tensor:
    """Repeat a parameter ``[R, G]`` over the weights that share it: ``[rows, in]`` with column ``c`` from group
    ``index[c]``.

    The law is ``rows % R == 0``.
    """
    p = p.index_select(1, index) if p.shape[1] > 1 else p.expand(-1, len(index))
    return p if p.shape[0] in (1, rows) else p.repeat_interleave(rows // p.shape[0], 0)
