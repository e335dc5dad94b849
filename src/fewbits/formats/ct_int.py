"""compressed-tensors, format "int-quantized": plain int8 weights beside quantized inputs (W8A8).

    weight             int8 [out, in]      code - 128
    weight_scale       [out, 1] or [1]     in the model's dtype
    weight_zero_point  int8 [out, 1]       zero - 128; absent when symmetric
    input_scale        [1]                 static inputs only

Also read: groups of columns (``weight_scale [out, groups]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbits.errors import CheckpointError
from fewbits.formats import common
from fewbits.grids import Int, groups_of
from fewbits.tensor import Quantized

FORMAT = "int-quantized"


def takes(grid: Int) -> bool:
    """Whether weights on ``grid`` with quantized inputs are written so; others are packed."""
    return grid.bits == 8


def pack(name: str, q: Quantized, grid: Int) -> dict[str, Tensor]:
    """See the file's head."""
    scale = q.params["scale"].contiguous()
    found = {
        f"{name}.weight": _signed(q.codes, grid),
        f"{name}.weight_scale": scale.reshape(1) if grid.rows == -1 else scale,
    }
    if "zero" in q.params:
        zero = _signed(q.params["zero"], grid)
        found[f"{name}.weight_zero_point"] = zero.reshape(1) if grid.rows == -1 else zero
    return found


def unpack(name: str, tensors: Mapping[str, Tensor], grid: Int) -> Quantized:
    """Inverse of :func:`pack`. Raises CheckpointError on wrong shapes or values."""
    weight = common.tensor(name, tensors, "weight", (torch.int8,), None)
    if weight.dim() != 2:
        raise CheckpointError(f"tensor {name}.weight has shape {list(weight.shape)}; expected [out, in]")
    groups = groups_of(weight.shape[1], grid.group)
    shared = (1, 1) if grid.rows == -1 else (len(weight), groups)
    scale = common.tensor(name, tensors, "weight_scale", common.SCALES, None)
    params = {"scale": _shaped(name, "weight_scale", common.finite(name, "weight_scale", scale), shared)}
    if not grid.symmetric:
        zero = common.tensor(name, tensors, "weight_zero_point", (torch.int8,), None)
        params["zero"] = _unsigned(_shaped(name, "weight_zero_point", zero, shared), grid)
    return Quantized(replace(grid, scale=common.SCALES[scale.dtype]), _unsigned(weight, grid), params)


def _shaped(name: str, suffix: str, t: Tensor, shape: tuple[int, int]) -> Tensor:
    if t.numel() != shape[0] * shape[1] or t.shape[0] != shape[0]:
        raise CheckpointError(f"tensor {name}.{suffix} has shape {list(t.shape)}; expected {list(shape)}")
    return t.reshape(shape).contiguous()


def _signed(codes: Tensor, grid: Int) -> Tensor:
    return (codes.to(torch.int16) - grid.middle).to(torch.int8).contiguous()


def _unsigned(codes: Tensor, grid: Int) -> Tensor:
    return (codes.to(torch.int16) + grid.middle).to(torch.uint8)
