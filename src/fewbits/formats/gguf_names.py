"""How GGUF names the tensors and settings of a model, as tables: transformers' names left, GGUF's right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbits.errors import RequestError
from fewbits.formats import gguf_rope

OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
PHI3 = {k: v for k, v in INSIDE.items() if k not in _FUSED}
PHI3 |= {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
GEMMA3 = INSIDE | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
ROUTED = {k: v for k, v in INSIDE.items() if k not in _FFN} | {"mlp.gate": "ffn_gate_inp"}
ROUTED |= {f"mlp.experts.{k}": v for k, v in EXPERTS.items()}
MIXTRAL = {k: v for k, v in INSIDE.items() if k not in _FFN} | {"block_sparse_moe.gate": "ffn_gate_inp"}
MIXTRAL |= {
    f"block_sparse_moe.experts.{k}": EXPERTS[v]
    for k, v in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
}


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp. Experts are named without their number: all of them are one tensor in GGUF.

    ``permute``: rotary pairs are neighbours, not halves, so rows of q and k are reordered. ``one_plus``: a norm's
    weight is stored as ``1 + w``. ``heads``: the head size is written out. ``rope``: the number of rotated dimensions
    is. ``vocabulary``: so is the size of the vocabulary.
    """

    name: str
    inside: Mapping[str, str] = field(default_factory=lambda: INSIDE)
    permute: bool = False
    one_plus: bool = False
    heads: bool = False
    rope: bool = False
    vocabulary: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", permute=True, rope=True, vocabulary=True, heads=True),
    "mistral": Family("llama", permute=True, rope=True, vocabulary=True, heads=True),
    "mixtral": Family("llama", MIXTRAL, permute=True, rope=True, vocabulary=True, heads=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", heads=True),
    "qwen3_moe": Family("qwen3moe", ROUTED, heads=True),
    "gemma3_text": Family("gemma3", GEMMA3, one_plus=True, heads=True),
    "gemma3": Family("gemma3", GEMMA3, one_plus=True, heads=True),
    "phi3": Family("phi3", PHI3, rope=True),
}
NOT_TEXT = re.compile(r"(^|\.)(vision|visual|multi_modal_projector)")
IN_BLOCK = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
COMPUTED = re.compile(r".*rotary_emb\.inv_freq")  # old checkpoints hold what the reader computes


def family(model_type: str) -> Family:
    """The table of a model type. Raises RequestError when there is none."""
    if model_type not in FAMILIES:
        raise RequestError(f"model type {model_type!r} cannot be written as GGUF; allowed: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def stored_name(name: str, f: Family) -> str | None:
    """GGUF's name of a tensor, None for one that GGUF leaves out. Raises RequestError for one that has no place."""
    if NOT_TEXT.search(name) or COMPUTED.fullmatch(name):
        return None
    if inside := IN_BLOCK.fullmatch(name):
        number, local, leaf = inside.groups()
        local = _EXPERT.sub(r"\1.\3", local)
        if local in f.inside:
            return f"blk.{number}.{f.inside[local]}.{leaf}"
    else:
        module, _, leaf = name.rpartition(".")
        if module.rpartition(".")[2] in OUTSIDE:
            return f"{OUTSIDE[module.rpartition('.')[2]]}.{leaf}"
    raise RequestError(f"tensor {name!r} has no place in a GGUF file of a {f.name} model")


def expert(name: str) -> int | None:
    """The number of the expert whose weight ``name`` is; None for any other tensor."""
    found = _EXPERT.search(name)
    return int(found[2]) if found else None


def text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    inner = config.get("text_config")
    return dict(config) if not isinstance(inner, Mapping) else dict(config) | dict(inner)


def head_size(c: Mapping[str, Any]) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def metadata(config: Mapping[str, Any], f: Family) -> dict[str, Any]:
    """What a reader must know of the model, from its config.json. Raises RequestError for what GGUF cannot say."""
    c, a = text(config), f.name
    try:
        found: dict[str, Any] = {
            f"{a}.context_length": c["max_position_embeddings"],
            f"{a}.embedding_length": c["hidden_size"],
            f"{a}.block_count": c["num_hidden_layers"],
            f"{a}.feed_forward_length": c["intermediate_size"],
            f"{a}.attention.head_count": c["num_attention_heads"],
            f"{a}.attention.head_count_kv": c.get("num_key_value_heads") or c["num_attention_heads"],
            f"{a}.attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        }
    except KeyError as e:
        raise RequestError(f"config.json has no {e.args[0]!r}, which a GGUF file needs") from None
    size = head_size(c)
    if f.heads:
        found |= {f"{a}.attention.key_length": size, f"{a}.attention.value_length": size}
    if f.rope:
        found[f"{a}.rope.dimension_count"] = gguf_rope.rotated(c, size)
    if f.vocabulary:
        found[f"{a}.vocab_size"] = c["vocab_size"]
    if c.get("sliding_window") and c.get("use_sliding_window", True):
        found[f"{a}.attention.sliding_window"] = c["sliding_window"]
    if a == "gemma3":
        _check_gemma(c)
    if experts := c.get("num_local_experts") or c.get("num_experts"):
        found |= {f"{a}.expert_count": experts, f"{a}.expert_used_count": c["num_experts_per_tok"]}
    if a == "qwen3moe":
        if not c.get("norm_topk_prob"):
            raise RequestError("GGUF's qwen3moe normalises the weights of chosen experts; this model does not")
        found[f"{a}.expert_feed_forward_length"] = c["moe_intermediate_size"]
    return found | gguf_rope.metadata(c, a)


def gemma_scalar(layers: int, width: int, heads: int, size: int) -> int:
    """What llama.cpp takes the root of to scale Gemma 3's attention: the 27B model's is not its head size."""
    return width // heads if layers == 62 else size


def _check_gemma(c: Mapping[str, Any]) -> None:
    """Gemma 3 as llama.cpp knows it: every sixth layer sees everything, and one way to scale attention."""
    kinds = c.get("layer_types") or []
    usual = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(len(kinds))]
    if kinds != usual:
        raise RequestError("GGUF's gemma3 has a global layer after every five local ones; this model has others")
    scalar = gemma_scalar(c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"], head_size(c))
    if c.get("query_pre_attn_scalar", scalar) != scalar:
        raise RequestError(f"GGUF's gemma3 has query_pre_attn_scalar {scalar}, this one {c['query_pre_attn_scalar']}")
