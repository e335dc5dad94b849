"""Products of quantized inputs: integers with integers where the scales allow it, dequantized operands elsewhere.

With one scale per token and one per output channel, ``y = s_x s_w (X W^T) + bias`` and ``X W^T`` is a product of
integers, which is exact. What has no such product (blocks, FP8 on a CPU, weights in groups) multiplies the dequantized
operands, ``inputs(x) @ W.T``: the same numbers up to the rounding of float32 sums.

LLM.int8() follows bitsandbytes rounding by rounding, so that a checkpoint gives the same logits in both: one ulp in a
layer is enough to send an input of the next to another code, and that is 1/127 of its maximum.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.activations import Inputs
from fewbits.grids import Int, Vectorwise
from fewbits.kernels import int8, w8a8
from fewbits.tensor import Quantized

log = logging.getLogger("fewbits")
_said: set[str] = set()
LARGEST = 127
UNIT_ON_CPU = 6.200124e-05
"""What bitsandbytes' portable code takes for 1/127²; a digit is missing, so it is 1.8e-5 too large. CUDA's is right."""


@dataclass(frozen=True)
class IntegerWeight:
    """``packed`` int8 ``[out, in]`` in the kernels' order, and ``scale`` float32 ``[out]`` (or ``[1]``).

    ``absmax`` float32 ``[out]``: LLM.int8()'s rows keep the maximum that ``scale`` is a 127th of, up to its rounding.
    """

    packed: w8a8.Packed
    scale: Tensor
    absmax: Tensor | None = None

    @classmethod
    def of(cls, q: Quantized) -> IntegerWeight | None:
        """None when the grid or the inputs' scheme has no integer product."""
        grid, inputs = q.grid, q.inputs
        if inputs is None or not inputs.scheme.integer or q.residual is not None:
            return None
        absmax = q.params["absmax"].float().reshape(-1) if isinstance(grid, Vectorwise) else None
        grid, params = grid.uniform(q.params) if isinstance(grid, Vectorwise) else (grid, q.params)
        if not isinstance(grid, Int) or not grid.symmetric or params["scale"].shape[1] != 1 or grid.rows not in (1, -1):
            return None
        codes = (q.codes.to(torch.int16) - grid.middle).to(torch.int8)
        return cls(w8a8.pack(codes.contiguous()), params["scale"].float().reshape(-1), absmax)

    @property
    def device(self) -> torch.device:
        return self.packed.data.device

    @property
    def codes(self) -> Tensor:
        """int8 ``[out, in]``."""
        return w8a8.unpack(self.packed)

    def to(self, device: torch.device) -> IntegerWeight:
        absmax = None if self.absmax is None else self.absmax.to(device)
        return IntegerWeight(w8a8.pack(self.codes.to(device)), self.scale.to(device), absmax)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, their sums and scales."""
        floats = self.packed.sums.numel() + self.scale.numel() + (0 if self.absmax is None else self.absmax.numel())
        return self.packed.data.numel() + 4 * floats

    def dense(self) -> Tensor:
        """float32 ``[out, in]``."""
        return self.codes.float() * self.scale[:, None]

    def matmul(self, x: Tensor, inputs: Inputs, bias: Tensor | None = None) -> Tensor:
        """``inputs(x) @ dense().T + bias`` for ``x [..., in]``: ``[..., out]`` in the dtype of ``x``.

        Computed in float32, in float64 for float64 ``x``.
        """
        flat = x.reshape(-1, x.shape[-1])
        y = self._mixed(flat, inputs, bias) if inputs.scheme.outliers else self._plain(flat, inputs, bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _plain(self, x: Tensor, inputs: Inputs, bias: Tensor | None) -> Tensor:
        codes, scale = inputs.encode(x)
        y = int8.matmul(codes.to(torch.int8), self.packed).to(scale.dtype) * scale * self.scale.to(scale.dtype)
        return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)

    def _mixed(self, x: Tensor, inputs: Inputs, bias: Tensor | None) -> Tensor:
        """LLM.int8(): the quiet columns as integers, the loud ones in the dtype of ``x`` with dequantized weights."""
        codes, absmax, loud = inputs.vectorwise(x)
        wide = absmax.dtype
        rows = self.scale.to(wide) * LARGEST if self.absmax is None else self.absmax.to(wide)
        unit = UNIT_ON_CPU if x.device.type == "cpu" and wide == torch.float32 else LARGEST**-2
        y = int8.matmul(codes.to(torch.int8), self.packed).to(wide) * (absmax * rows) * unit
        y = (y if bias is None else y + bias.to(wide)).to(x.dtype)
        columns = loud.nonzero()[:, 0]
        if not len(columns):
            return y
        weight = (
            w8a8.unpack(self.packed, columns).contiguous() * rows[:, None] * (1 / LARGEST)
        )  # strides choose the BLAS
        return torch.addmm(y, x[:, columns], weight.to(x.dtype).t())


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
