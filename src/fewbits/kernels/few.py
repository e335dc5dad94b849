"""Products of float32 rows with weights of at most 4 bits, for processors without bfloat16: in bytes.

The codes of the weight are taken as they are, ``w = scale (code - zero)`` in groups of whole runs of ``RUN`` columns; a
run of a row of ``x`` is rounded to 8 bits with a scale of its own. AVX2 multiplies twice as many bytes as 16-bit
integers in an instruction (VPMADDUBSW), and with sums of few enough bits nothing overflows. Rounding is off by at most
half a step, 1/254 of the run's largest value: twice bfloat16's there, and as much for smaller values.
Measured on two cores of a Zen 3: the layers of a small Llama take 1.45 times as long in :mod:`fewbits.kernels.fixed`
with one thread, 1.2 times with two; 80 to 90 products a nanosecond and core of the 137 that its instructions allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels import _table, reference
from fewbits.kernels._table import register, require, shape

RUN, MOST = 32, 127
HIGHEST = 15
"""The largest code of a weight."""

register(
    "few_linear",
    "(x: f32[T,n], w: Few[m,n], bias: f32[m]|None) -> f32[T,m], x w^T + bias",
    lambda level: "byte products" if level == "portable" else "AVX2 VPMADDUBSW",
)


@dataclass(frozen=True)
class Few:
    """A weight ``scale (code - zero)`` ``[out, in]``: ``codes`` uint8 up to 15, ``scale`` and ``zero`` float32
    ``[out, groups]`` of ``group`` columns each, a multiple of 32 unless there is one group; and ``packed`` for C++.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int
    packed: Tensor | None

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Few:
        """Pack a weight. Raises RequestError on wrong shapes or dtypes, or for groups that are not whole runs."""
        require(
            codes.dtype == torch.uint8 and codes.ndim == 2 and scale.dtype == zero.dtype == torch.float32,
            f"Few needs codes uint8[m, n], scale and zero float32; got {shape(codes)}, {shape(scale)}, {shape(zero)}",
        )
        rows, columns = codes.shape
        require(
            group >= 1 and (group % RUN == 0 or group >= columns),
            f"groups of {group} columns are not whole runs of {RUN}; give a multiple, or all {columns} columns",
        )
        groups = (rows, -(-columns // group))
        require(scale.shape == zero.shape == groups, f"scale and zero must be float32{list(groups)}")
        codes, scale, zero = codes.contiguous(), scale.contiguous(), zero.contiguous()
        packed = None
        if _table.native(codes, scale, zero) and codes.numel():
            packed = torch.empty(_table.C.few_size(rows, columns), dtype=torch.uint8)
            addresses = [t.data_ptr() for t in (packed, codes, scale, zero)]
            _table.C.few_weight(*addresses, rows, columns, group, _table.threads())
        return cls(codes, scale, zero, group, packed)


def few_linear(x: Tensor, w: Few, bias: Tensor | None = None) -> Tensor:
    """``x w^T + bias`` float32 ``[..., m]`` for ``x [..., n]``; runs lie along ``n``.

    NaN or infinity in a run makes everything computed from it NaN; runs below 1e-30 count as zero. The result does not
    depend on the number of threads. Raises RequestError on wrong shapes or dtypes.
    """
    m, n = w.codes.shape
    require(
        x.dtype == torch.float32 and x.ndim >= 1 and x.shape[-1] == n,
        f"few_linear needs x float32[..., {n}]; got {shape(x)}",
    )
    require(
        bias is None or (bias.dtype == torch.float32 and bias.shape == (m,)),
        f"bias must be float32[{m}]; got {shape(bias)}",
    )
    rows = x.detach().reshape(x.shape[:-1].numel(), n)
    if w.packed is None or not _table.native(x, bias) or not rows.numel():
        out = reference.few_linear(rows, w.codes, w.scale, w.zero, w.group, bias)
    else:
        out = x.new_empty(len(rows), m)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        bias = None if bias is None else bias.detach().contiguous()
        addresses = [0 if t is None else t.data_ptr() for t in (out, rows, w.packed, bias)]
        _table.C.few_linear(*addresses, len(rows), n, m, w.group, rows.stride(0), _table.threads())
    return out.view(*x.shape[:-1], m)
