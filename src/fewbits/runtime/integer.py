"""Products of quantized inputs: integers with integers where the scales allow it, dequantized operands elsewhere.

With one scale per token and one per output channel, ``y = s_x s_w (X W^T) + bias`` and ``X W^T`` is a product of
integers, which is exact. What has no such product (blocks, FP8 on a CPU, weights in groups) multiplies the dequantized
operands, ``inputs(x) @ W.T``: the same numbers up to the rounding of float32 sums.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.activations import Inputs, half, loud_columns, real
from fewbits.grids import Int
from fewbits.kernels import int8, w8a8
from fewbits.tensor import Quantized

log = logging.getLogger("fewbits")
_said: set[str] = set()


@dataclass(frozen=True)
class IntegerWeight:
    """``packed`` int8 ``[out, in]`` in the kernels' order, and ``scale`` float32 ``[out]`` (or ``[1]``)."""

    packed: w8a8.Packed
    scale: Tensor

    @classmethod
    def of(cls, q: Quantized) -> IntegerWeight | None:
        """None when the grid or the inputs' scheme has no integer product."""
        grid, inputs = q.grid, q.inputs
        if inputs is None or not inputs.scheme.integer or q.residual is not None or not isinstance(grid, Int):
            return None
        one_scale = q.params["scale"].shape[1] == 1 and grid.rows in (1, -1)
        if not grid.symmetric or not one_scale:
            return None
        codes = (q.codes.to(torch.int16) - grid.middle).to(torch.int8)
        return cls(w8a8.pack(codes.contiguous()), q.params["scale"].float().reshape(-1))

    @property
    def device(self) -> torch.device:
        return self.packed.data.device

    @property
    def codes(self) -> Tensor:
        """int8 ``[out, in]``."""
        return w8a8.unpack(self.packed)

    def to(self, device: torch.device) -> IntegerWeight:
        return IntegerWeight(w8a8.pack(self.codes.to(device)), self.scale.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, their sums and scales."""
        return self.packed.data.numel() + 4 * (self.packed.sums.numel() + self.scale.numel())

    def dense(self) -> Tensor:
        """float32 ``[out, in]``."""
        return self.codes.float() * self.scale[:, None]

    def matmul(self, x: Tensor, inputs: Inputs) -> Tensor:
        """``inputs(x) @ dense().T`` for ``x [..., in]``, float32 ``[..., out]`` (float64 for float64 ``x``)."""
        flat = x.reshape(-1, x.shape[-1])
        codes, scale = inputs.encode(flat)
        total = int8.matmul(codes.to(torch.int8), self.packed).to(scale.dtype)
        y = total * scale * self.scale.to(scale.dtype)
        if inputs.scheme.outliers:
            y += self._loud(flat, inputs.scheme.outliers)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _loud(self, x: Tensor, threshold: float) -> Tensor:
        """The product over the columns that stay in 16 bits, with the dequantized columns of the weight."""
        kept = half(x)
        columns = loud_columns(kept, threshold).nonzero()[:, 0]
        if not len(columns):
            return torch.zeros((), dtype=real(x).dtype, device=x.device)
        wide = real(x).dtype
        weight = w8a8.unpack(self.packed, columns).to(wide) * self.scale[:, None].to(wide)
        return kept[:, columns].to(wide) @ weight.t()


def say(inputs: Inputs, grid: object, device: str, integer: bool) -> None:
    """One log line for each kind of product, the first time that it is computed in a slower way than it could be."""
    kind = f"{inputs.scheme.element} activations per {inputs.scheme.granularity}"
    if integer and int8.chosen(device) == "reference":
        line = f"{kind}: no fast integer product on this {device}; exact products of float32 are used"
    elif not integer:
        line = f"{kind}: no product of {type(grid).__name__.lower()} codes on {device}; operands are dequantized"
    else:
        return
    if line not in _said:
        _said.add(line)
        log.warning(line)
