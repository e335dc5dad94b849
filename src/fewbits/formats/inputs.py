"""How quantized inputs are described: in our own configuration, and as compressed-tensors' ``input_activations``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from fewbits.activations import ELEMENTS, PRESETS, Activations, Inputs
from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import common

SCALE = "input_scale"
SEARCH = ("rule", "percentile")  # how a static scale was found is stored nowhere


def describe(scheme: Activations) -> dict[str, Any]:
    """What a reader needs of a scheme, for our own layout."""
    return {k: v for k, v in asdict(scheme).items() if k not in SEARCH}


def parse(described: Any) -> Activations:
    """Inverse of :func:`describe`. Raises CheckpointError."""
    known = {f.name: f.default for f in fields(Activations) if f.name not in SEARCH}
    if not isinstance(described, Mapping) or set(described) - set(known):
        raise CheckpointError(f"quantization_config has activations {str(described)[:120]}, which cannot be read")
    if any(type(v) is not type(known[k]) for k, v in described.items()):
        raise CheckpointError(f"quantization_config has activations of wrong types: {str(described)[:120]}")
    try:
        return Activations(**described)
    except RequestError as e:
        raise CheckpointError(f"quantization_config has activations that cannot be: {e}") from None


def stored(scheme: Activations) -> Activations:
    """The part of a scheme that a file holds."""
    return parse(describe(scheme))


def input_scale(name: str, tensors: Mapping[str, Tensor], scheme: Activations | None) -> Inputs | None:
    """The inputs of module ``name``: its scheme, and its scale ``[1]`` from ``tensors`` when that is static."""
    if scheme is None or scheme.dynamic:
        return None if scheme is None else Inputs(scheme)
    scale = common.tensor(name, tensors, SCALE, common.SCALES, None)
    if scale.numel() != 1 or not float(scale) > 0:
        raise CheckpointError(f"tensor {name}.{SCALE} is not one positive number; the checkpoint is damaged")
    return Inputs(scheme, common.finite(name, SCALE, scale).float().reshape(1))


def scale_of(name: str, inputs: Inputs | None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensor to store for a static scale; nothing for others."""
    return {} if inputs is None or inputs.scale is None else {f"{name}.{SCALE}": inputs.scale.to(dtype).reshape(1)}


# ---- compressed-tensors ----------------------------------------------------------------------------------------------

_FOREIGN = {  # element: (num_bits, type, strategy of its blocks)
    "int8": (8, "int", "group"),
    "int4": (4, "int", "group"),
    "fp8": (8, "float", "group"),
    "nvfp4": (4, "float", "tensor_group"),
    "mxfp4": (4, "float", "group"),
}


def refusal(scheme: Activations) -> str | None:
    """Why compressed-tensors cannot describe a scheme."""
    if scheme.outliers:
        return "it has no place for outlier columns found at run time; use format fewbits"
    if scheme.element in ("nvfp4", "mxfp4"):
        return f"{scheme.element} activations are not written in it; use format fewbits"
    return None


def to_foreign(scheme: Activations) -> dict[str, Any]:
    """``input_activations`` as compressed-tensors has it."""
    bits, kind, blocks = _FOREIGN[scheme.element]
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": blocks if scheme.granularity == "block" else scheme.granularity,
        "group_size": scheme.block or None,
        "dynamic": scheme.dynamic,
    }


def from_foreign(described: Mapping[str, Any]) -> Activations:
    """A scheme from ``input_activations``. Raises CheckpointError for what cannot be read."""
    bits = common.setting(described, ("num_bits",), lambda v: v in (4, 8), 8)
    kind = common.setting(described, ("type",), lambda v: v in ("int", "float"), "int")
    common.setting(described, ("symmetric",), lambda v: v is True, True)
    strategy = common.setting(described, ("strategy",), lambda v: v in ("token", "tensor", "group"), "token")
    dynamic = common.setting(described, ("dynamic",), common.is_flag, False)
    element = next((e for e, (b, t, _) in _FOREIGN.items() if (b, t) == (bits, kind) and not ELEMENTS[e].block), None)
    if element is None:
        raise CheckpointError(f"quantization_config says input_activations {str(described)[:80]}, which cannot be read")
    block = common.setting(described, ("group_size",), common.is_group, 0) if strategy == "group" else 0
    return parse(
        {
            "element": element,
            "dynamic": dynamic,
            "granularity": "block" if strategy == "group" else strategy,
            "block": block,
        }
    )


def kv_cache_scheme(kind: str) -> dict[str, Any] | None:
    """``kv_cache_scheme`` for a cache of 8 bits, "int8" or "fp8"; None for kinds that it cannot say."""
    if kind not in ("int8", "fp8"):
        return None
    return to_foreign(PRESETS[f"{kind}-static"])


_CACHES = {(8, "int"): "int8", (4, "int"): "int4", (2, "int"): "int2", (8, "float"): "fp8"}


def cache_kind(config: Mapping[str, Any]) -> str | None:
    """The kind of KV cache that a ``quantization_config`` asks for; None where it asks for none.

    Raises CheckpointError for one that is not known.
    """
    ours, theirs = config.get("kv_cache"), config.get("kv_cache_scheme")
    if ours is None and theirs is None:
        return None
    if ours is None and isinstance(theirs, Mapping):
        ours = _CACHES.get((theirs.get("num_bits", 8), theirs.get("type", "int")))
    if ours not in _CACHES.values():
        raise CheckpointError(
            f"quantization_config asks for KV cache {str(theirs if ours is None else ours)[:80]}, which is unknown; "
            f"known: {', '.join(_CACHES.values())}; --kv-cache none reads it without"
        )
    return str(ours)
