"""The linear layer of a quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.activations import Inputs
from fewbits.errors import RequestError
from fewbits.grids import Int, Vectorwise
from fewbits.kernels import gpu, qbackward, qlinear
from fewbits.kernels.sparse import matmul_transposed, sparse_matmul
from fewbits.runtime import packing, tiles, twin
from fewbits.runtime.integer import IntegerWeight, say
from fewbits.tensor import Quantized, Sparse


class QuantLinear(nn.Module):
    """``x @ W.T + bias`` with ``W [out, in]`` kept as codes; stands for nn.Linear and for transformers' Conv1D.

    On the CPU the codes are prepacked for the C++ product, on GPUs for the Triton twins. Elsewhere, without either, and
    for weights that the kernels do not hold (on the CPU blocks across rows, for example), the weight is dequantized on
    every call. Single weights beside prepacked codes are a sparse product of their own.
    Where the inputs are quantized too, integers are multiplied with integers if their scales allow it. Codes get no
    gradient; inputs do. The weight is not part of ``state_dict``: a loaded model is saved by copying its checkpoint.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self.grid: Any = None
        self._packed: qlinear.PackedWeight | None = None
        self._kept: dict[str, Tensor] = {}
        self._twin: Any = None
        self._loose: Quantized | None = None
        self._sparse: Sparse | None = None
        self.inputs: Inputs | None = None
        self._integer: IntegerWeight | None = None
        self._told = False
        self._offset: tuple[Any, Tensor | None] = (None, None)

    @classmethod
    def from_quantized(cls, q: Quantized, bias: Tensor | None = None) -> QuantLinear:
        """A layer with the weight ``q`` and ``bias [out]``, which keeps its dtype."""
        layer = cls(q.shape[1], q.shape[0])
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return layer.fill(q)

    def fill(self, q: Quantized) -> QuantLinear:
        """Take the weight. Raises RequestError when its shape is not ``(out_features, in_features)``."""
        if q.shape != (self.out_features, self.in_features):
            raise RequestError(f"weight of shape {q.shape} given, the layer is {(self.out_features, self.in_features)}")
        self._integer = IntegerWeight.of(q)
        if isinstance(q.grid, Vectorwise):
            grid, params = q.grid.uniform(q.params)
            q = Quantized(grid, q.codes, params, q.residual, inputs=q.inputs)
        self.grid, self.inputs, self._loose = q.grid, q.inputs, None
        self._sparse = q.residual if isinstance(q.residual, Sparse) else None
        codes = replace(q, residual=None) if self._sparse else q
        self._packed = None if self._integer else packing.pack(codes)
        self._twin = twin.pack(codes) if self._packed is None and self._integer is None else None
        held = self._packed is not None or self._twin is not None
        self._kept = q.params if held and not isinstance(q.grid, Int) else {}
        if self._packed is None and self._integer is None and self._twin is None:
            self._loose, self._sparse = q, None
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            if not self._told:
                self._told = True
                say(self.inputs, self.grid, x.device.type, self._integer is not None)
            if self._integer is not None and not (x.requires_grad and torch.is_grad_enabled()):
                return self._integer.matmul(x, self.inputs, self.bias)
            x = _straight(x, self.inputs) if x.requires_grad and torch.is_grad_enabled() else self.inputs(x)
        if x.requires_grad and torch.is_grad_enabled():
            product: Tensor = tiles.Product.apply(x, self)
            return product if self.bias is None else product + self.bias.to(product.dtype)
        p, fused = self._packed, x.dtype in qlinear.DTYPES
        if fused and self._twin is not None and x.device == self._twin.device:
            return self._beside(gpu.linear(x, self._twin, self.bias), x)
        if p is None or not fused or x.device.type != "cpu":
            weight = self.dequantize(x.dtype).to(x.device)
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return self._beside(qlinear.matmul(x, p, None if self.bias is None else self._bias()), x)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` with the product of the single weights, where there are some beside packed codes."""
        s = self._sparse
        return y if s is None else y + sparse_matmul(x, s.offsets, s.columns, s.values).to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """``x @ W.T`` without bias, for training: no dense weight is made, but for GPU twins for the moment."""
        if self._packed is not None and x.dtype in qlinear.DTYPES and x.device.type == "cpu":
            return self._beside(qlinear.matmul(x, self._packed), x)
        return tiles.product(x, self._tiles(x), self.out_features)

    def product_transposed(self, dy: Tensor) -> Tensor:
        """``dy @ W``: the gradient of :meth:`product`."""
        if self._packed is not None and dy.dtype in qlinear.DTYPES and dy.device.type == "cpu":
            dx = qbackward.matmul_transposed(dy, self._packed)
            s = self._sparse
            return dx if s is None else dx + matmul_transposed(dy, s.offsets, s.columns, s.values, s.shape[1])
        return tiles.product_transposed(dy, self._tiles(dy), self.in_features)

    def _tiles(self, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """``(begin, end, W[begin:end])`` in the dtype and on the device of ``like``."""
        for begin, end, w in self._float_tiles():
            yield begin, end, w.to(like.device, like.dtype)

    def _float_tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        if self._packed is not None:
            for begin in range(0, self.out_features, tiles.ROWS):
                end = min(begin + tiles.ROWS, self.out_features)
                w = qbackward.rows(self._packed, begin, end)
                yield begin, end, w if self._sparse is None else w + self._sparse.rows(begin, end)
        elif self._loose is not None:
            yield from tiles.of_quantized(self._loose)
        elif self._integer is not None:
            yield from tiles.of_rows(self._integer.codes, self._integer.scale)
        else:
            yield 0, self.out_features, self.dequantize()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[out, in]``; in float32 ``Quantized.dense()``, to the bit but for grids with a global scale."""
        if self._packed is not None and self._sparse is None:
            return qlinear.dequantize(self._packed, dtype)
        if self._packed is not None or self._twin is not None:
            w = self._twin.dense() if self._packed is None else qlinear.dequantize(self._packed, torch.float32)
            return (w if self._sparse is None else w + self._sparse.dense()).to(dtype)
        if self._integer is not None:
            return self._integer.dense().to(dtype)
        if self._loose is None:
            raise RequestError("this layer has no weight yet; load a checkpoint or call fill")
        return self._loose.dense().to(dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, for code that looks at ``module.weight``; computed on every access."""
        if self.grid is None:  # transformers' initialisers touch it before it is there
            return torch.empty(self.out_features, self.in_features, device="meta")
        return self.dequantize(torch.float32 if self.bias is None else self.bias.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and their parameters in memory."""
        held = self._packed if self._packed is not None else self._twin
        if held is not None:
            return int(held.nbytes) + (self._sparse.nbytes if self._sparse else 0)
        if self._integer is not None:
            return self._integer.nbytes
        if self._loose is None:
            return 0
        beside = self._loose.residual.nbytes if isinstance(self._loose.residual, Sparse) else 0
        return beside + sum(t.numel() * t.element_size() for t in [self._loose.codes, *self._loose.params.values()])

    def extra_repr(self) -> str:
        kind = "empty" if self.grid is None else f"bits={getattr(self.grid, 'bits', '?')}, group={self.grid.period}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}, bias={self.bias is not None}"

    def _bias(self) -> Tensor:
        """The bias in float32, converted again only after a change."""
        assert self.bias is not None
        key = (self.bias.data_ptr(), self.bias._version, self.bias.dtype)
        if self._offset[0] != key:
            self._offset = (key, self.bias.detach().float().contiguous())
        return self._offset[1]  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, dtype=torch.uint8, device=self._device())).device
        if device != self._device() and device.type != "meta":
            self._move(device)
        return self

    def _device(self) -> torch.device:
        if self._twin is not None:
            return self._twin.device
        if self._integer is not None:
            return self._integer.device
        return torch.device("cpu") if self._loose is None else self._loose.codes.device

    def _move(self, device: torch.device) -> None:
        if self.inputs is not None and self.inputs.scale is not None:
            self.inputs = Inputs(self.inputs.scheme, self.inputs.scale.to(device))
        if self._integer is not None:
            self._integer = self._integer.to(device)
            return
        q = self._loose
        if self._packed is not None:
            q = replace(packing.unpack(self.grid, self._packed, self._kept), residual=self._sparse)
        elif self._twin is not None:
            q = replace(twin.unpack(self.grid, self._twin, self._kept), residual=self._sparse)
        if q is not None:
            moved = {name: t.to(device) for name, t in q.params.items()}
            residual = q.residual.to(device) if isinstance(q.residual, Sparse) else q.residual
            self.fill(Quantized(q.grid, q.codes.to(device), moved, residual, inputs=self.inputs))


def _straight(x: Tensor, inputs: Inputs) -> Tensor:
    """``inputs(x)`` with the gradient of ``x``: rounding has none."""
    return x + (inputs(x) - x).detach()
