"""Products as llama.cpp's CPU code makes them: inputs are rounded to the type that the weight's type asks for.

ggml multiplies blocks of codes with blocks of codes. Before a product the input is brought to Q8_0 (32 numbers share a
float16 scale; for weights in Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4), Q8_1 (the same, for Q4_1 and Q5_1), Q8_K (256 numbers
share a float32 scale; for k-quants and ternary weights), or to the weight's own float type; keys and values are kept in
float16. With these roundings our forward pass of a file computes what llama.cpp computes, up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from fewbits.errors import RequestError
from fewbits.formats import gguf, gguf_import, gguf_names

Q8_0_PARTNERS = frozenset({"q4_0", "q5_0", "q8_0", "iq4_nl", "mxfp4", "nvfp4", "q4_1", "q5_1"})
FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16}


def q8_0(x: Tensor) -> Tensor:
    """``x [..., columns]`` rounded to blocks of 32: scale ``absmax / 127``, stored in float16; float32."""
    blocks = x.float().unflatten(-1, (-1, 32))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(d > 0, blocks * (1 / d), 0.0).round()
    return (codes * d.half().float()).flatten(-2)


def q8_k(x: Tensor) -> Tensor:
    """``x`` rounded to blocks of 256: the largest magnitude becomes -127, codes at most 127; float32."""
    blocks = x.float().unflatten(-1, (-1, 256))
    m = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(m == 0, 0.0, -127 / m)
    codes = (blocks * scale).round().clamp(max=127)
    return torch.where(scale == 0, 0.0, codes * (1 / scale)).flatten(-2)


def rounded(x: Tensor, kind: str) -> Tensor:
    """``x`` as a weight of type ``kind`` meets it."""
    if kind in FLOATS:
        return x.to(FLOATS[kind]).to(x.dtype)
    if kind == "f32":
        return x
    return (q8_0 if kind in Q8_0_PARTNERS else q8_k)(x).to(x.dtype)


def install(model: nn.Module, file: gguf.File) -> None:
    """Round the inputs of every linear layer of ``model``, which was loaded from ``file``, and keys and values.

    Raises RequestError for a model with experts.
    """
    config = gguf_import.config_of(file)
    if "num_experts_per_tok" in config:
        raise RequestError(f"{file.path} has experts, whose inputs are not rounded here; give another --engine")
    family = gguf_names.FAMILIES[config["model_type"]]
    kinds = {}
    for name, info in file.infos.items():
        plain = gguf_import.plain_name(name, family)
        if plain is not None and plain.endswith(".weight"):
            kinds[plain.removesuffix(".weight")] = info.kind
    kinds.setdefault("lm_head", kinds["model.embed_tokens"])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = kinds[name]
            module.register_forward_pre_hook(lambda m, x, kind=kind: (rounded(x[0], kind), *x[1:]))
    model.register_forward_pre_hook(_halved, with_kwargs=True)


def _halved(model: nn.Module, given: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if settings.get("past_key_values") is None:
        settings = settings | {"past_key_values": HalfCache(model.config), "use_cache": True}
    return given, settings


class _HalfLayer(DynamicLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states.half(), value_states.half())
        return keys.to(key_states.dtype), values.to(value_states.dtype)


class HalfCache(DynamicCache):
    """Keys and values in float16, as llama.cpp keeps them by default."""

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.layers = [_HalfLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
