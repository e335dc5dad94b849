"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: codes packed along the inputs, zeros along the outputs.

    qweight  int32   [in*b/32, out]   word i of column o holds inputs i*32/b ..., least significant first
    qzeros   int32   [G, out*b/32]    version 1 ("gptq") stores zero - 1, version 2 ("gptq_v2") stores zero
    scales   float16 [G, out]
    g_idx    int32   [in]             group of each input

``W[o, i] = scales[g_idx[i], o] * (code - zero[g_idx[i], o])``. Version 1 cannot hold zero 0, so it is written only when
every grid is symmetric, for the sake of older readers; affine models are written as version 2.
"""

from __future__ import annotations

import json
import re
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

BITS = (2, 3, 4, 8)
_BLOCK = re.compile(r"\.\d+\.")


_DEFAULT = Int(4, 128, symmetric=True)


@dataclass(frozen=True)
class GPTQ:
    """``grid`` is that of every module that no rule of ``dynamic`` (pattern, grid or None for dense) matches first."""

    grid: Int = _DEFAULT
    version: int = 2
    dynamic: tuple[tuple[str, Int | None], ...] = ()

    name: ClassVar[str] = "gptq"
    scale_dtype: ClassVar[str | None] = "float16"
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def check(self, entries: Sequence[Entry]) -> list[Refusal]:
        return common.refusals(entries, _reasons)

    def pack(self, name: str, q: Quantized) -> dict[str, Tensor]:
        """See the file's head. Raises RequestError when ``q`` is not what :meth:`check` let through."""
        grid = common.integer(q, name, self.name)
        if reasons := list(_reasons(Entry(name, q.shape, grid), grid)):
            raise RequestError(f"{name}: format gptq cannot store it: {reasons[0]}")
        zero = common.zeros(q, grid)
        if self.version == 1 and "zero" in q.params and not int(zero.min()):
            raise RequestError(f"{name}: zero point 0 cannot be stored in version 1 of format gptq; write version 2")
        return {
            f"{name}.qweight": bitpack.pack(q.codes, grid.bits, dim=1).t().contiguous(),
            f"{name}.qzeros": bitpack.pack((zero - (1 if self.version == 1 else 0)).t(), grid.bits),
            f"{name}.scales": q.params["scale"].t().contiguous(),
            f"{name}.g_idx": common.columns(q, grid).contiguous(),
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> Quantized:
        grid = self._grid(name)
        scales = common.tensor(name, tensors, "scales", common.SCALES, None)
        qweight = common.tensor(name, tensors, "qweight", (torch.int32,), None)
        if scales.ndim != 2 or qweight.ndim != 2:
            raise CheckpointError(
                f"tensors {name}.scales and {name}.qweight must be matrices; the checkpoint is damaged"
            )
        out = scales.shape[1]
        inputs = qweight.shape[0] * 32 // grid.bits
        groups = groups_of(inputs, grid.group)
        common.tensor(name, tensors, "qweight", (torch.int32,), (bitpack.words(inputs, grid.bits), out))
        common.tensor(name, tensors, "scales", common.SCALES, (groups, out))
        qzeros = common.tensor(name, tensors, "qzeros", (torch.int32,), (groups, bitpack.words(out, grid.bits)))
        zero = self._zeros(qzeros, grid, out)
        grid = replace(grid, scale=common.SCALES[scales.dtype], symmetric=zero is None)
        params = {"scale": common.finite(name, "scales", scales).t().contiguous()}
        params |= {} if zero is None else {"zero": zero}
        if "g_idx" in tensors:
            g_idx = common.tensor(name, tensors, "g_idx", (torch.int32, torch.int64), (inputs,))
            params |= common.scattered(name, g_idx, grid.group, groups)
        return Quantized(grid, bitpack.unpack(qweight, grid.bits, inputs, dim=0).t().contiguous(), params)

    def _zeros(self, qzeros: Tensor, grid: Int, out: int) -> Tensor | None:
        """uint8 ``[out, G]``, or None when the grid is symmetric and its zeros are the middle."""
        raw = bitpack.unpack(qzeros, grid.bits, out).t().contiguous()
        # Files exist whose version is declared wrongly; symmetric zeros tell it: all middle is 2, all middle - 1 is 1.
        if grid.symmetric and bool((raw == grid.middle).all() | (raw == grid.middle - 1).all()):
            return None
        if self.version == 2:
            return raw
        if grid.bits == 3:
            return (raw + 1) & grid.qmax
        # Writers subtract from whole words, so borrows cross codes: only the same sum on whole words undoes it.
        return bitpack.unpack(bitpack.shift_words(qzeros, grid.bits, 1), grid.bits, out).t().contiguous()

    def _grid(self, name: str) -> Int:
        for pattern, grid in self.dynamic:
            if re.match(pattern, name):
                if grid is None:
                    raise CheckpointError(f"{name} is packed, but quantization_config excludes it ({pattern[:80]!r})")
                return grid
        return self.grid

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        grids = {e.name: common.stored(e.grid) for e in entries if isinstance(e.grid, Int)}
        usual = common.usual(grids.values()) or self.grid
        dense = [e.name for e in entries if e.grid is None]
        symmetric = all(g.symmetric for g in grids.values())
        found: dict[str, Any] = {"quant_method": "gptq", **_describe(usual)}
        found |= {
            "desc_act": any(e.scattered for e in entries),
            "checkpoint_format": "gptq" if symmetric else "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": any(name.split(".")[-1] == "lm_head" for name in grids),
            "meta": {"quantizer": [common.writer()]},
        }
        dynamic = {
            f"+:{_names([n for n, g in grids.items() if g == other])}": _describe(other)
            for other in _others(grids, usual)
        }
        if inside := [name for name in dense if _BLOCK.search(name)]:
            dynamic[f"-:{_names(inside)}"] = {}
            found["modules_in_block_to_quantize"] = [list(dict.fromkeys(_inside(n) for n in grids if _BLOCK.search(n)))]
        if any(g.group != -1 and e.shape[1] % g.group for e in entries if (g := grids.get(e.name))):
            found["backend"] = "torch"  # GPTQModel's only kernel for a short last group; transformers picks one for all
        return found | ({"dynamic": dynamic} if dynamic else {})

    def files(self, entries: Sequence[Entry]) -> dict[str, str]:
        return {"quantize_config.json": json.dumps(self.config(entries), indent=2) + "\n"}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GPTQ:
        grid = _parse(config, _DEFAULT)
        form = common.setting(config, ("checkpoint_format", "format"), lambda v: v in ("gptq", "gptq_v2"), "gptq")
        common.setting(config, ("pack_dtype",), lambda v: v == "int32", "int32")
        rules: dict[str, Any] = common.setting(config, ("dynamic",), lambda v: isinstance(v, dict), {})
        return cls(grid, 2 if form == "gptq_v2" else 1, tuple(_rule(p, o, grid) for p, o in rules.items()))


def _reasons(e: Entry, grid: Int) -> Iterator[str]:
    if grid.bits not in BITS:
        yield f"{grid.bits} bits have no place in it; allowed: 2, 3, 4, 8; or use format fewbits"
        return
    if grid.rows != 1:
        yield "scales shared by several rows have no place in it; use one row per scale"
    if grid.scale != "float16":
        yield f"its readers take float16 scales only, not {grid.scale}"
    whole = bitpack.whole(grid.bits)
    if e.shape[0] % whole or e.shape[1] % whole:
        yield f"{grid.bits}-bit weights need rows and columns in multiples of {whole}"


def _describe(grid: Int) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group, "sym": grid.symmetric}


def _parse(config: Mapping[str, Any], default: Int) -> Int:
    bits = common.setting(config, ("bits",), lambda v: type(v) is int and v in BITS, default.bits)
    group = common.setting(config, ("group_size",), common.is_group, default.group)
    return Int(bits, group, symmetric=common.setting(config, ("sym",), common.is_flag, default.symmetric))


def _rule(pattern: str, override: Any, default: Int) -> tuple[str, Int | None]:
    try:
        re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except (re.error, OverflowError, RecursionError):
        raise CheckpointError(
            f"quantization_config has a pattern that is not a regular expression: {pattern[:80]!r}"
        ) from None
    if pattern.startswith("-:"):
        return pattern[2:], None
    if not isinstance(override, dict):
        raise CheckpointError(f"quantization_config says nothing useful for {pattern[:80]!r}: {str(override)[:80]}")
    return pattern.removeprefix("+:"), _parse(override, default)


def _others(grids: Mapping[str, Int], usual: Int) -> list[Int]:
    return [g for g in dict.fromkeys(grids.values()) if g != usual]


def _names(names: Sequence[str]) -> str:
    """A regular expression for exactly these names; dots are the one special character of module names."""
    return "^(?:" + "|".join(n.replace(".", r"\.") for n in names) + ")$"


def _inside(name: str) -> str:
    """The name from its block on: ``self_attn.q_proj``."""
    return _BLOCK.split(name, maxsplit=1)[1]
