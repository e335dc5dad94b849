"""What decoding does between products, for one token: each is one call of C++ instead of ten of torch.

Results are rounded where transformers' Llama modules round them. The functions ending in ``_reference`` are the
specification, and serve where the extension is not built.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels import qlinear


def available() -> bool:
    """Whether the C++ extension is there and has these functions."""
    return qlinear.available() and hasattr(qlinear._C, "rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x**2) + eps)`` in float32, rounded to x's dtype, times ``weight``: ``[rows, size]`` contiguous.

    ``weight [size]`` has x's dtype: float32, bfloat16 or float16.
    """
    if not available():
        return rms_norm_reference(x, weight, eps)
    rows, size = x.shape
    y = torch.empty_like(x)
    qlinear._C.rms_norm(x.data_ptr(), rows, size, qlinear.DTYPES[x.dtype], weight.data_ptr(), y.data_ptr(), eps)
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """``x * cosines + swapped * sines`` in place, ``swapped`` being x with the halves of each row exchanged.

    ``x [rows, size]`` contiguous; ``cosines`` and ``sines [size]`` contiguous in x's dtype, the first half of
    ``sines`` negated.
    """
    if not available():
        rotate_reference(x, cosines, sines)
        return
    rows, size = x.shape
    qlinear._C.rotate(x.data_ptr(), rows, size, qlinear.DTYPES[x.dtype], cosines.data_ptr(), sines.data_ptr())


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of :func:`rms_norm`."""
    wide = x.float()
    factor = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * factor).to(x.dtype) * weight


def rotate_reference(x: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """The specification of :func:`rotate`."""
    x.copy_(x * cosines + x.roll(x.shape[-1] // 2, -1) * sines)
