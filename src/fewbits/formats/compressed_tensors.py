"""compressed-tensors, as vLLM and transformers read it. Floating-point grids lie as ``ct_float.py`` says, 8 bits with
quantized inputs as ``ct_int.py`` says; other integers are "pack-quantized", codes packed along the inputs:

    weight_packed      int32 [out, ceil(in*b/32)]   code, least significant first
    weight_shape       int64 [2]                    (out, in)
    weight_scale       [out, G] or [1]              in the model's dtype
    weight_zero_point  int32 [ceil(out*b/32), G]    packed along the outputs; int8 [1] per tensor; absent when symmetric
    input_scale        [1]                          for inputs with a static scale

The definition is signed, ``(q - zp) * scale`` with ``q = code - 2**(b-1)``, and the stored integers add ``2**(b-1)``
again: what lies on disk is the unsigned code and the unsigned zero point. The per-tensor zero point alone is signed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.activations import Activations
from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import bitpack, common, ct_float, ct_int, inputs
from fewbits.formats.base import Entry, Refusal
from fewbits.grids import Float, Int, groups_of
from fewbits.tensor import Quantized

# Written as one dense bitstream; for 3 bits only recent releases of the library read that. vLLM runs 4 and 8.
BITS = (2, 3, 4, 8)
_STRATEGIES = ("tensor", "channel", "group")
PACKED, MIXED = "pack-quantized", "mixed-precision"
FORMATS = (PACKED, ct_int.FORMAT, *ct_float.FORMS)


@dataclass(frozen=True)
class Scheme:
    """What a config_group says: the weights' grid, what becomes of the inputs, and how the weights lie on disk."""

    grid: Int | Float
    inputs: Activations | None
    format: str

    @classmethod
    def of(cls, grid: Int | Float, activations: Activations | None) -> Scheme:
        """The one in which such a layer is written."""
        if isinstance(grid, Float):
            form = ct_float.form_of(grid) or PACKED
        else:
            form = ct_int.FORMAT if ct_int.takes(grid) and activations is not None else PACKED
        return cls(common.stored(grid), None if activations is None else inputs.stored(activations), form)


@dataclass(frozen=True)
class CompressedTensors:
    """``schemes`` are (target, scheme) in the library's order: names, then regular expressions, then module classes."""

    schemes: tuple[tuple[str, Scheme], ...] = ()

    name: ClassVar[str] = "compressed-tensors"
    scale_dtype: ClassVar[str | None] = None
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
        | {"weight_global_scale", "input_scale"}
    )

    def check(self, entries: Sequence[Entry]) -> list[Refusal]:
        floats = [e for e in entries if isinstance(e.grid, Float)]
        found = common.refusals([e for e in entries if not isinstance(e.grid, Float)], _reasons)
        return found + common.refusals(floats, ct_float.reasons, Float)

    def activations(self, e: Entry) -> str | None:
        """Why the inputs of an entry cannot be described."""
        return None if e.activations is None else inputs.refusal(e.activations)

    def pack(self, name: str, q: Quantized) -> dict[str, Tensor]:
        """See the file's head. Raises RequestError when ``q`` is not what :meth:`check` let through."""
        if isinstance(q.grid, Float):
            if reasons := list(ct_float.reasons(Entry(name, q.shape, q.grid, "g_idx" in q.params), q.grid)):
                raise RequestError(f"{name}: format compressed-tensors cannot store it: {reasons[0]}")
            dtype = q.params["scale"].dtype
            return ct_float.pack(name, q, q.grid) | inputs.scale_of(
                name, q.inputs, dtype if dtype in common.SCALES else torch.float32
            )
        grid = common.integer(q, name, self.name)
        if reasons := list(_reasons(Entry(name, q.shape, grid, "g_idx" in q.params), grid)):
            raise RequestError(f"{name}: format compressed-tensors cannot store it: {reasons[0]}")
        scale = q.params["scale"].contiguous()
        static = inputs.scale_of(name, q.inputs, scale.dtype)
        if Scheme.of(grid, None if q.inputs is None else q.inputs.scheme).format == ct_int.FORMAT:
            return ct_int.pack(name, q, grid) | static
        found = static | {
            f"{name}.weight_packed": bitpack.pack(q.codes, grid.bits),
            f"{name}.weight_scale": scale.reshape(1) if grid.rows == -1 else scale,
            f"{name}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if "zero" in q.params:
            found[f"{name}.weight_zero_point"] = _pack_zero(q.params["zero"], grid)
        return found

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> Quantized:
        scheme = self._scheme(name)
        return replace(self._weight(name, tensors, scheme), inputs=inputs.input_scale(name, tensors, scheme.inputs))

    def _weight(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Quantized:
        if isinstance(scheme.grid, Float):
            return ct_float.unpack(name, tensors, scheme.grid)
        return (ct_int.unpack if scheme.format == ct_int.FORMAT else _unpack)(name, tensors, scheme.grid)

    def _scheme(self, name: str) -> Scheme:
        for target, scheme in self.schemes:
            if (
                target == name
                or (target.startswith("re:") and re.match(target[3:], name))
                or target in ("Linear", "Embedding")
            ):
                return scheme
        raise CheckpointError(f"{name} is packed, but no config_group of quantization_config targets it")

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        schemes = {e.name: Scheme.of(e.grid, e.activations) for e in entries if isinstance(e.grid, (Int, Float))}
        usual = next((s for s, _ in Counter(schemes.values()).most_common(1)), None)
        others = [s for s in dict.fromkeys(schemes.values()) if s != usual]
        groups = [_describe(s, [n for n in schemes if schemes[n] == s]) for s in others]
        groups += [_describe(usual, ["Linear"])] if usual else []
        ignore = [e.name for e in entries if e.grid is None]
        # A tied output layer is no tensor of the checkpoint, yet it is a Linear of the model.
        ignore += [] if any(e.name.split(".")[-1] == "lm_head" for e in entries) else ["lm_head"]
        forms = {s.format for s in schemes.values()} or {PACKED}
        found = {
            "quant_method": "compressed-tensors",
            "format": forms.pop() if len(forms) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": ignore,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        # transformers (5.23 with compressed-tensors 0.20) prepares packed modules without packing their zero points and
        # cannot load affine ones; MX and NVFP4 weights it makes bfloat16 even in models of another dtype, which then do
        # not run. It can dequantize both kinds while loading. vLLM passes over this key.
        return found | {"dequantize": True} if any(_awkward(s) for s in schemes.values()) else found

    def files(self, entries: Sequence[Entry]) -> dict[str, str]:
        return {}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> CompressedTensors:
        form = common.setting(config, ("format",), lambda v: v in (*FORMATS, MIXED), PACKED)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError("quantization_config has no config_groups; the configuration is damaged")
        schemes: list[tuple[str, Scheme]] = []
        for label, group in groups.items():
            if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
                raise CheckpointError(
                    f"quantization_config: config_group {str(label)[:80]!r} has no weights that can be read"
                )
            own = common.setting(group, ("format",), lambda v: v in FORMATS, form)
            common.setting(group, ("output_activations",), lambda v: not v, None)
            described = common.setting(group, ("input_activations",), lambda v: isinstance(v, Mapping), None)
            targets = group.get("targets")
            if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
                raise CheckpointError(f"quantization_config: config_group {str(label)[:80]!r} has no list of targets")
            taken = None if described is None else inputs.from_foreign(described)
            scheme = Scheme(_grid(own, label, group["weights"]), taken, own)
            schemes += [(target, scheme) for target in targets]
        return cls(tuple(sorted(schemes, key=lambda s: _specific(s[0]))))


def _unpack(name: str, tensors: Mapping[str, Tensor], grid: Int) -> Quantized:
    """A weight in format pack-quantized."""
    out, columns = _shape(name, tensors)
    dense, padded = bitpack.words(columns, grid.bits), -(-columns // (32 // grid.bits))
    packed = common.tensor(name, tensors, "weight_packed", (torch.int32,), None)
    if tuple(packed.shape) not in ((out, dense), (out, padded)):
        raise CheckpointError(f"tensor {name}.weight_packed has shape {list(packed.shape)}; expected {[out, dense]}")
    groups = groups_of(columns, grid.group)
    shape: tuple[int, ...] = (1,) if grid.rows == -1 else (out, groups)
    scale = common.tensor(name, tensors, "weight_scale", common.SCALES, None)
    if grid.rows == -1:
        shape = tuple(scale.shape) if scale.numel() == 1 else (1,)
    common.tensor(name, tensors, "weight_scale", common.SCALES, shape)
    params = {"scale": common.finite(name, "weight_scale", scale).reshape(-1, groups).contiguous()}
    if not grid.symmetric:
        params["zero"] = _unpack_zero(name, tensors, grid, (out, groups))
    if "weight_g_idx" in tensors:
        g_idx = common.tensor(name, tensors, "weight_g_idx", (torch.int32, torch.int64), (columns,))
        params |= common.scattered(name, g_idx, grid.group, groups)
    codes = _codes(packed, grid.bits, columns, packed.shape[1] == dense)
    return Quantized(replace(grid, scale=common.SCALES[scale.dtype]), codes, params)


def _reasons(e: Entry, grid: Int) -> Iterator[str]:
    if grid.bits not in BITS:
        yield f"{grid.bits} bits are not written in it; allowed: 2, 3, 4, 8; or use format fewbits"
    if grid.rows not in (1, -1) or (grid.rows == -1 and grid.group != -1):
        yield "tiles of several rows have no place in it; use a scale per group, per row or per tensor"
    if e.scattered:
        yield "groups must be consecutive columns (its readers dropped g_idx); use format gptq or fewbits"
    if grid.group != -1 and e.shape[1] % grid.group:
        yield common.indivisible(e.shape[1], grid.group)


def _describe(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """A config_group."""
    grid = scheme.grid
    weights = ct_float.describe(grid) if isinstance(grid, Float) else _weights(grid)
    taken = None if scheme.inputs is None else inputs.to_foreign(scheme.inputs)
    found = {"targets": targets, "weights": weights, "input_activations": taken, "output_activations": None}
    return found if scheme.format == PACKED and taken is None else found | {"format": scheme.format}


def _weights(grid: Int) -> dict[str, Any]:
    strategy = "tensor" if grid.rows == -1 else "channel" if grid.group == -1 else "group"
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group if strategy == "group" else None,
        "dynamic": False,
    }


def _awkward(s: Scheme) -> bool:
    if isinstance(s.grid, Float):
        return s.grid.scale not in common.SCALES.values()
    return not s.grid.symmetric and s.format == PACKED


def _grid(form: str, label: object, weights: Mapping[str, Any]) -> Int | Float:
    if form == MIXED:
        raise CheckpointError(f"quantization_config: config_group {str(label)[:80]!r} does not say its format")
    return _parse(weights) if form in (PACKED, ct_int.FORMAT) else ct_float.parse(weights, form)


def _parse(weights: Mapping[str, Any]) -> Int:
    bits = common.setting(weights, ("num_bits",), lambda v: type(v) is int and 2 <= v <= 8, 8)
    common.setting(weights, ("type",), lambda v: v == "int", "int")
    group = common.setting(weights, ("group_size",), common.is_group, -1)
    strategy = common.setting(weights, ("strategy",), lambda v: v in _STRATEGIES, "group" if group > 0 else "channel")
    symmetric = common.setting(weights, ("symmetric",), common.is_flag, True)
    rows = -1 if strategy == "tensor" else 1
    return Int(bits, group if strategy == "group" else -1, rows, symmetric)


def _specific(target: str) -> int:
    return 1 if target.startswith("re:") else 2 if target in ("Linear", "Embedding") else 0


def _shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    out, columns = common.tensor(name, tensors, "weight_shape", (torch.int64, torch.int32), (2,)).tolist()
    if not 0 < out < 2**31 or not 0 < columns < 2**31:
        raise CheckpointError(f"tensor {name}.weight_shape says {[out, columns]}; the checkpoint is damaged")
    return out, columns


def _pack_zero(zero: Tensor, grid: Int) -> Tensor:
    if grid.rows == -1:
        return (zero.to(torch.int16) - grid.middle).to(torch.int8).reshape(1)
    return bitpack.pack(zero, grid.bits, dim=0)


def _unpack_zero(name: str, tensors: Mapping[str, Tensor], grid: Int, shape: tuple[int, int]) -> Tensor:
    if grid.rows != -1:
        want = (bitpack.words(shape[0], grid.bits), shape[1])
        packed = common.tensor(name, tensors, "weight_zero_point", (torch.int32,), want)
        return bitpack.unpack(packed, grid.bits, shape[0], dim=0)
    signed = common.tensor(name, tensors, "weight_zero_point", (torch.int8,), None)
    zero = signed.reshape(-1).to(torch.int16) + grid.middle
    if len(zero) != 1 or not 0 <= int(zero) <= grid.qmax:
        raise CheckpointError(
            f"tensor {name}.weight_zero_point lies outside {grid.bits} bits; the checkpoint is damaged"
        )
    return zero.to(torch.uint8).reshape(1, 1)


def _codes(packed: Tensor, bits: int, columns: int, dense: bool) -> Tensor:
    if dense:
        return bitpack.unpack(packed, bits, columns)
    # Earlier releases of the library put floor(32/b) codes into each word and left the rest of it empty.
    each = 32 // bits
    codes = bitpack.unpack(packed.unsqueeze(-1), bits, each)
    return codes.reshape(len(packed), -1)[:, :columns].contiguous()
