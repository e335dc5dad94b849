"""AWQ checkpoints in AutoAWQ's "gemm" version: 4 bits, packed along the outputs with an interleave.

    qweight  int32   [in, out/8]   nibble i of word c holds output 8*c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros   int32   [G, out/8]    the same interleave; present for symmetric grids too, filled with 8
    scales   float16 [G, out]

``W[o, i] = scales[i // g, o] * (code - zero[i // g, o])``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import bitpack, common
from fewbits.formats.base import Entry, Refusal
from fewbits.grids import Int, groups_of
from fewbits.tensor import Quantized

_DEFAULT = Int(4, 128)


@dataclass(frozen=True)
class AWQ:
    """One ``grid`` for all modules: the format has no place for a second."""

    grid: Int = _DEFAULT

    name: ClassVar[str] = "awq"
    scale_dtype: ClassVar[str | None] = "float16"
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})

    def check(self, entries: Sequence[Entry]) -> list[Refusal]:
        usual = common.usual(e.grid for e in entries if isinstance(e.grid, Int))
        mixed = [e.name for e in entries if isinstance(e.grid, Int) and common.stored(e.grid) != usual]
        reason = "all modules must have the same bits, group size and symmetry; use format gptq or fewbits"
        return common.refusals(entries, _reasons) + [Refusal(name, reason) for name in mixed]

    def pack(self, name: str, q: Quantized) -> dict[str, Tensor]:
        """See the file's head. Raises RequestError when ``q`` is not what :meth:`check` let through."""
        grid = common.integer(q, name, self.name)
        if reasons := list(_reasons(Entry(name, q.shape, grid, "g_idx" in q.params), grid)):
            raise RequestError(f"{name}: format awq cannot store it: {reasons[0]}")
        return {
            f"{name}.qweight": bitpack.pack_awq(q.codes.t()),
            f"{name}.qzeros": bitpack.pack_awq(common.zeros(q, grid).t()),
            f"{name}.scales": q.params["scale"].t().contiguous(),
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> Quantized:
        qweight = common.tensor(name, tensors, "qweight", (torch.int32,), None)
        if qweight.ndim != 2:
            raise CheckpointError(f"tensor {name}.qweight must be a matrix; the checkpoint is damaged")
        inputs, out = qweight.shape[0], 8 * qweight.shape[1]
        if self.grid.group != -1 and inputs % self.grid.group:
            raise CheckpointError(f"{name}: {inputs} columns are not a multiple of group size {self.grid.group}")
        groups = groups_of(inputs, self.grid.group)
        qzeros = common.tensor(name, tensors, "qzeros", (torch.int32,), (groups, out // 8))
        scales = common.tensor(name, tensors, "scales", common.SCALES, (groups, out))
        zero = bitpack.unpack_awq(qzeros).t().contiguous()
        symmetric = self.grid.symmetric and bool((zero == self.grid.middle).all())
        params = {"scale": common.finite(name, "scales", scales).t().contiguous()} | (
            {} if symmetric else {"zero": zero}
        )
        grid = replace(self.grid, scale=common.SCALES[scales.dtype], symmetric=symmetric)
        return Quantized(grid, bitpack.unpack_awq(qweight).t().contiguous(), params)

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        usual = common.usual(e.grid for e in entries if isinstance(e.grid, Int)) or self.grid
        # Kernels want zeros to be there, so zero_point is true even for symmetric grids; "sym" is for us alone.
        found = {"quant_method": "awq", "bits": 4, "group_size": usual.group, "zero_point": True, "version": "gemm"}
        return found | {
            "sym": usual.symmetric,
            "modules_to_not_convert": [e.name for e in entries if e.grid is None] or None,
        }

    def files(self, entries: Sequence[Entry]) -> dict[str, str]:
        return {}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> AWQ:
        common.setting(config, ("bits", "w_bit"), lambda v: type(v) is int and v == 4, 4)
        common.setting(config, ("version", "format"), lambda v: isinstance(v, str) and v.lower() == "gemm", "gemm")
        group = common.setting(config, ("group_size", "q_group_size"), common.is_group, 128)
        affine = common.setting(config, ("zero_point",), common.is_flag, True)
        return cls(Int(4, group, symmetric=common.setting(config, ("sym",), common.is_flag, not affine)))


def _reasons(e: Entry, grid: Int) -> Iterator[str]:
    if grid.bits != 4:
        yield f"{grid.bits} bits have no place in it; allowed: 4; or use format gptq or fewbits"
    if grid.rows != 1:
        yield "scales shared by several rows have no place in it; use one row per scale"
    if grid.scale != "float16":
        yield f"its readers take float16 scales only, not {grid.scale}"
    if e.scattered:
        yield "groups must be consecutive columns (no activation order with g_idx); use format gptq or fewbits"
    if e.shape[0] % 8:
        yield "rows must be a multiple of 8"
    if grid.group != -1 and e.shape[1] % grid.group:
        yield common.indivisible(e.shape[1], grid.group)
    if e.name.split(".")[-1] == "lm_head":
        yield "its readers keep lm_head dense; leave it out, or use format fewbits"
