"""compressed-tensors' formats for floating-point weights.

    format                 weight                           weight_scale
    float-quantized        float8_e4m3fn [out, in]          [1] | [out, 1] | [out, G] | [ceil(out/b), ceil(in/b)], real
    mxfp8-quantized        float8_e4m3fn [out, in]          uint8 (E8M0) [out, in/32]
    mxfp6-pack-quantized   packed uint8 [out, in*3/4]       uint8 (E8M0) [out, in/32]
    mxfp4-pack-quantized   packed uint8 [out, in/2]         uint8 (E8M0) [out, in/32]
    nvfp4-pack-quantized   packed uint8 [out, in/2]         float8_e4m3fn [out, in/16]; weight_global_scale float32 [1]

Packed codes are one bitstream, least significant first: the even column in the low nibble. What lies on disk is what
our Params hold: their scale multiplies, their global scale divides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import CheckpointError
from fewbits.formats import bitpack, common
from fewbits.formats.base import Entry
from fewbits.grids import Float
from fewbits.tensor import Quantized

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Form:
    """One format: its ``element``, the ``scale`` (None: any real dtype), the ``group`` (0: any), and whether packed."""

    element: str
    scale: str | None = None
    group: int = 0
    packed: bool = True

    @property
    def suffix(self) -> str:
        return "weight_packed" if self.packed else "weight"

    def holds(self, grid: Float) -> bool:
        """Whether weights on ``grid`` are written in this format."""
        real = grid.scale in common.SCALES.values()
        scale = real if self.scale is None else (grid.scale, grid.rows) == (self.scale, 1)
        return grid.element == self.element and scale and self.group in (0, grid.group)


FORMS: dict[str, Form] = {
    "float-quantized": Form("e4m3", packed=False),
    "mxfp8-quantized": Form("e4m3", "e8m0", 32, packed=False),
    "mxfp6-pack-quantized": Form("e2m3", "e8m0", 32),
    "mxfp4-pack-quantized": Form("e2m1", "e8m0", 32),
    "nvfp4-pack-quantized": Form("e2m1", "e4m3", 16),
}
_SCALE_NAMES = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


def form_of(grid: Float) -> str | None:
    """The format in which weights on ``grid`` are written; None without one."""
    return next((name for name, form in FORMS.items() if form.holds(grid)), None)


def reasons(e: Entry, grid: Float) -> Iterator[str]:
    """Why an entry cannot be stored."""
    if form_of(grid) is None:
        yield (
            f"it has no place for {grid.element} in groups of {grid.group} with {grid.scale} scales; "
            "it has fp8, fp8-block, fp8-tensor, mxfp8, mxfp6, mxfp4 and nvfp4; or use format fewbits"
        )
        return
    if e.scattered:
        yield "groups must be consecutive columns (its readers dropped g_idx); use format fewbits"
    if _strategy(grid) is None:
        yield f"scales shared by {grid.rows} rows and {grid.group} columns have no place in it; use format fewbits"
    if grid.group != -1 and e.shape[1] % grid.group:
        yield f"its readers want columns in multiples of {grid.group}; use format fewbits"
    if FORMS[form_of(grid) or ""].packed and e.shape[1] * grid.bits % 8:
        yield f"{e.shape[1]} columns of {grid.bits} bits fill no whole bytes; use format fewbits"


def pack(name: str, q: Quantized, grid: Float) -> dict[str, Tensor]:
    """See the file's head."""
    form = FORMS[form_of(grid) or ""]
    scale = q.params["scale"].contiguous()
    codes = bitpack.to_bytes(q.codes, grid.bits) if form.packed else q.codes.contiguous().view(E4M3)
    found = {
        f"{name}.{form.suffix}": codes,
        f"{name}.weight_scale": scale.reshape(1) if _strategy(grid) == "tensor" else scale,
    }
    return found | ({f"{name}.weight_global_scale": q.params["global"]} if "global" in q.params else {})


def unpack(name: str, tensors: Mapping[str, Tensor], grid: Float) -> Quantized:
    """Inverse of :func:`pack`. Raises CheckpointError on wrong shapes or values."""
    form = FORMS[form_of(grid) or ""]
    stored = common.tensor(name, tensors, form.suffix, (torch.uint8,) if form.packed else (E4M3,), None)
    if stored.ndim != 2 or (form.packed and stored.shape[1] * 8 % grid.bits):
        raise CheckpointError(f"tensor {name}.{form.suffix} has shape {list(stored.shape)}; expected [out, columns]")
    columns = stored.shape[1] * 8 // grid.bits
    codes = bitpack.from_bytes(stored, grid.bits) if form.packed else stored.view(torch.uint8)
    shape = grid.tiles((len(codes), columns))
    dtypes = {"e8m0": (torch.uint8,), "e4m3": (E4M3,)}.get(grid.scale, tuple(common.SCALES))
    scale = common.tensor(name, tensors, "weight_scale", dtypes, None)
    if scale.numel() != shape[0] * shape[1] or (scale.ndim == 2 and tuple(scale.shape) != shape):
        raise CheckpointError(f"tensor {name}.weight_scale has shape {list(scale.shape)}; expected {list(shape)}")
    params = {"scale": _sound(name, "weight_scale", scale.reshape(shape).contiguous())}
    if grid.scale == "e4m3":
        shared = common.tensor(name, tensors, "weight_global_scale", (torch.float32,), None)
        if shared.numel() != 1 or not float(shared) > 0:
            raise CheckpointError(f"tensor {name}.weight_global_scale is not one positive number")
        params["global"] = _sound(name, "weight_global_scale", shared.reshape(1))
    if form.scale is None:
        grid = replace(grid, scale=common.SCALES[scale.dtype])
    return Quantized(grid, codes.contiguous(), params)


def describe(grid: Float) -> dict[str, Any]:
    """``weights`` of a config_group."""
    strategy = _strategy(grid)
    grouped = strategy in ("group", "tensor_group")
    found = {
        "num_bits": grid.bits,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": grid.group if grouped else None,
        "dynamic": False,
    }
    found |= {"block_structure": [grid.rows, grid.group]} if strategy == "block" else {}
    return found | ({"scale_dtype": _SCALE_NAMES[grid.scale]} if grid.scale in _SCALE_NAMES else {})


def parse(weights: Mapping[str, Any], name: str) -> Float:
    """The grid of a config_group in format ``name``. Raises CheckpointError when it is not one of this format."""
    form = FORMS[name]
    common.setting(weights, ("type",), lambda v: v == "float", "float")
    common.setting(weights, ("symmetric",), lambda v: v is True, True)
    common.setting(weights, ("num_bits",), lambda v: v == Float(form.element).bits, None)
    if form.scale is not None:
        group = common.setting(weights, ("group_size",), lambda v: v == form.group, form.group)
        return Float(form.element, group, scale=form.scale)
    group = common.setting(weights, ("group_size",), common.is_group, -1)
    strategy = common.setting(weights, ("strategy",), lambda v: v in _STRATEGIES, "group" if group > 0 else "channel")
    rows = -1 if strategy == "tensor" else 1
    if strategy == "block":
        rows, group = common.setting(weights, ("block_structure",), _is_block, None) or (128, 128)
    return Float(form.element, group if strategy in ("group", "block") else -1, rows)


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)


def _strategy(grid: Float) -> str | None:
    """What the library calls the granularity; None for tiles that it does not know."""
    if grid.scale == "e4m3":
        return "tensor_group"
    if -1 in (grid.rows, grid.group):
        return {(-1, -1): "tensor", (1, -1): "channel"}.get((grid.rows, grid.group))
    return "group" if grid.rows == 1 else "block"


def _sound(name: str, suffix: str, t: Tensor) -> Tensor:
    """``t`` itself; CheckpointError when it holds a NaN or an infinity."""
    if t.dtype == torch.uint8:
        if bool((t == 255).any()):
            raise CheckpointError(f"tensor {name}.{suffix} holds NaN; the checkpoint is damaged")
        return t
    common.finite(name, suffix, t.float())
    return t
