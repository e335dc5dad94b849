"""Rotary embeddings in GGUF: settings that are metadata, and factors that are tensors, there and back.

Linear and YaRN scaling are metadata. Llama 3's divisors of the frequencies are the tensor ``rope_freqs.weight``
(arXiv 2407.21783, released code); Phi-3's, one set for short texts and one for long ones, are ``rope_factors_short``
and ``rope_factors_long`` (LongRoPE, arXiv 2402.13753), of which llama.cpp takes the one that its context's size asks
for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import RequestError

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)


def parameters(c: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under one roof: transformers 5 keeps them in ``rope_parameters`` (per layer type for Gemma)."""
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    if isinstance(rope.get("full_attention"), Mapping):
        rope = dict(rope["full_attention"])
    rope.setdefault("rope_theta", c.get("rope_theta"))
    if c.get("original_max_position_embeddings"):
        rope.setdefault("original_max_position_embeddings", c["original_max_position_embeddings"])
    rope.setdefault("partial_rotary_factor", c.get("partial_rotary_factor") or 1.0)
    return rope


def kind_of(rope: Mapping[str, Any]) -> str:
    """``default``, ``linear``, ``yarn``, ``llama3``, ``longrope``, ... as transformers names it now."""
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    return "longrope" if kind == "su" else kind


def rotated(c: Mapping[str, Any], head: int) -> int:
    """How many of the ``head`` dimensions of a head are rotated."""
    return int(head * parameters(c)["partial_rotary_factor"])


def metadata(c: Mapping[str, Any], a: str) -> dict[str, Any]:
    """What architecture ``a`` says of them. Raises RequestError for what GGUF cannot say."""
    rope = parameters(c)
    kind = kind_of(rope)
    found: dict[str, Any] = {f"{a}.rope.freq_base": float(rope.get("rope_theta") or 10000.0)}
    if kind in ("linear", "yarn"):
        found |= {f"{a}.rope.scaling.type": kind, f"{a}.rope.scaling.factor": float(rope["factor"])}
    elif kind == "longrope" and a == "phi3":
        found[f"{a}.rope.scaling.attn_factor"] = _attention(c, rope)
    elif kind not in ("default", "llama3"):
        raise RequestError(
            f"rotary embedding of type {kind!r} cannot be written as GGUF's {a}; allowed: linear, yarn, llama3, and "
            "longrope for phi3"
        )
    if kind in ("linear", "yarn", "longrope") and "original_max_position_embeddings" in rope:
        found[f"{a}.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return found


def _attention(c: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """What LongRoPE multiplies cosines and sines by (section 3.3 of the paper, as transformers computes it)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or c["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def tensors(c: Mapping[str, Any], head: int) -> dict[str, Tensor]:
    """The factors of a model as GGUF's tensors, float32 ``[rotated dimensions / 2]``. Raises RequestError."""
    rope = parameters(c)
    kind, half = kind_of(rope), rotated(c, head) // 2
    if kind == "llama3":
        return {FREQS: llama3(rope, head)}
    if kind != "longrope":
        return {}
    found = {name: torch.tensor(rope[key], dtype=torch.float32) for name, key in _FACTORS.items()}
    for name, t in found.items():
        if t.shape != (half,):
            raise RequestError(f"config.json has {t.numel()} numbers in {_FACTORS[name]}; the model needs {half}")
    return found


_FACTORS = {LONG: "long_factor", SHORT: "short_factor"}


def llama3(rope: Mapping[str, Any], size: int) -> Tensor:
    """What Llama 3 divides its frequencies by, float32 ``[size / 2]``."""
    factor, low, high = (
        float(rope.get(k, d)) for k, d in (("factor", 8), ("low_freq_factor", 1), ("high_freq_factor", 4))
    )
    context = float(rope.get("original_max_position_embeddings", 8192))
    found = []
    for i in range(size // 2):
        wavelength = 2 * math.pi * float(rope.get("rope_theta") or 10000.0) ** (2 * i / size)
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32)


def long_factors(long: Tensor, short: Tensor) -> dict[str, Any]:
    """The settings of config.json for two tensors of factors."""
    return {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
