"""Quantized weights for GPUs: which grids the Triton twins hold, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbits.errors import RequestError
from fewbits.grids import Int, spread
from fewbits.kernels import gpu, triton
from fewbits.tensor import Quantized


def pack(q: Quantized) -> Any:
    """``q`` as a weight of :mod:`fewbits.kernels.gpu`, or None where twins do not run or do not hold it."""
    packer = PACKERS.get(type(q.grid))
    if packer is None or q.residual is not None or not triton.usable(q.codes.device):
        return None
    try:
        return packer(q)
    except RequestError:
        return None  # groups that are not even: the dense weight serves


def unpack(grid: Any, weight: Any) -> Quantized:
    """What :func:`pack` was given, with the parameters of every row written out."""
    codes, scale, zero, g_idx = weight.unpack()
    params = {"scale": scale, "zero": zero, "g_idx": g_idx}
    return Quantized(grid, codes, {name: p for name, p in params.items() if p is not None})


def _ints(q: Quantized) -> gpu.IntWeight:
    grid: Any = q.grid
    rows, groups = q.shape[0], torch.arange(q.params["scale"].shape[1], device=q.codes.device)
    scale, zero = (
        None if p is None else spread(p, groups, rows).expand(rows, -1)
        for p in (q.params["scale"], q.params.get("zero"))
    )
    assert scale is not None
    return gpu.pack_int(q.codes, scale, zero, grid.bits, grid.group, q.params.get("g_idx"))


PACKERS: dict[type, Callable[[Quantized], Any]] = {Int: _ints}
"""A grid joins with one line; its weight needs ``unpack`` to leave the GPU again."""
