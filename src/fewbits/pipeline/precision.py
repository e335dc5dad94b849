"""What calibration's products are computed in, by the name that ``--compute`` gives it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fewbits import kernels
from fewbits.grids import Int
from fewbits.kernels import few, fixed
from fewbits.kernels.gradients import FixedGradients
from fewbits.tensor import Quantized


@dataclass(frozen=True)
class Precision:
    """Forward passes run inside ``context()``, those that are differentiated inside ``differentiable()``; inputs are
    observed as ``observed`` and added up by ``sums``. ``steady``: the number of threads changes no product, however few
    its rows; libraries' products of few rows round differently with it. ``learn`` is told what a weight holds once that
    is quantized.
    """

    context: Callable[[], AbstractContextManager[Any]]
    observed: torch.dtype
    sums: kernels.Sums
    differentiable: Callable[[], AbstractContextManager[Any]] = nullcontext
    steady: bool = False
    learn: Callable[[torch.Tensor, Quantized], None] = lambda weight, q: None


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _learn(weight: torch.Tensor, q: Quantized) -> None:
    """Products of whole groups of small codes are computed in bytes; inputs that are quantized already are left so."""
    grid, columns = q.grid, q.codes.shape[-1]
    if not isinstance(grid, Int) or grid.qmax > few.HIGHEST or grid.rows != 1:
        return
    if q.residual is not None or q.inputs is not None or "g_idx" in q.params:
        return
    group = columns if grid.group == -1 else grid.group
    if group % few.RUN == 0 or group >= columns:
        scale = q.params["scale"].float()
        setattr(weight, fixed.FEW, few.Few.of(q.codes, scale, grid.zero_points(q.params), group))


PRECISIONS = {
    "bf16": Precision(_autocast, torch.bfloat16, kernels.SUMS, _autocast),
    "fp32": Precision(nullcontext, torch.float32, kernels.SUMS),
    "fixed": Precision(fixed.FixedPoint, torch.float32, fixed.SUMS, FixedGradients, steady=True, learn=_learn),
}


def default_compute() -> str:
    """The fastest on this processor: bf16 where it multiplies bfloat16 natively, fixed where AVX2 is the widest it has,
    else fp32."""
    if kernels.multiplies_bf16():
        return "bf16"
    return "fixed" if kernels.level() == "avx2" else "fp32"
