"""What calibration's products are computed in, by the name that ``--compute`` gives it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fewbits import kernels
from fewbits.kernels import fixed


@dataclass(frozen=True)
class Precision:
    """Forward passes run inside ``context()``, those that are differentiated inside ``differentiable()``; inputs are
    observed as ``observed`` and added up by ``sums``. ``steady``: the number of threads changes no product, however few
    its rows; libraries' products of few rows round differently with it.
    """

    context: Callable[[], AbstractContextManager[Any]]
    observed: torch.dtype
    sums: kernels.Sums
    differentiable: Callable[[], AbstractContextManager[Any]] = nullcontext
    steady: bool = False


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


PRECISIONS = {
    "bf16": Precision(_autocast, torch.bfloat16, kernels.SUMS, _autocast),
    "fp32": Precision(nullcontext, torch.float32, kernels.SUMS),
    "fixed": Precision(fixed.FixedPoint, torch.float32, fixed.SUMS, steady=True),
}


def default_compute() -> str:
    """The fastest on this processor: bf16 where it multiplies bfloat16 natively, fixed where AVX2 is the widest it has,
    else fp32."""
    if kernels.multiplies_bf16():
        return "bf16"
    return "fixed" if kernels.level() == "avx2" else "fp32"
