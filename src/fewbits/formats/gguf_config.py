"""The metadata of a GGUF file as a transformers config.json, held against the tensors that the file has.

What the metadata says decides how large a model is built; it is believed where the tensors' shapes say the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import gguf, gguf_names, gguf_rope

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
_WEIGHT = re.compile(r"blk\.(\d{1,6})\.([a-z0-9_]+)\.weight")


def config_of(file: gguf.File) -> dict[str, Any]:
    """config.json of the metadata. Raises RequestError for an unknown architecture, CheckpointError for bad values."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise RequestError(f"{file.path}: architecture {str(name)[:40]!r}; readable: {', '.join(ARCHITECTURES)}")
    kind, architecture = ARCHITECTURES[name]
    get = _getter(file, name)
    width, heads = get("embedding_length", int), get("attention.head_count", int)
    embedding = file.infos.get("token_embd.weight")
    odd = not heads or (width % heads and get("attention.key_length", int) is None)
    if embedding is None or len(embedding.shape) != 2 or odd:
        raise CheckpointError(f"{file.path}: embedding or heads do not make a model; download it again")
    rope = _rope(file, get)
    found = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": get("attention.key_length", int, width // heads),
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in file.infos,
        "attention_bias": "blk.0.attn_q.bias" in file.infos,
    }
    if rope["rope_type"] == "longrope":  # Phi-3's config wants it here too
        found["original_max_position_embeddings"] = rope.get("original_max_position_embeddings")
    turned = get("rope.dimension_count", int, found["head_dim"])
    if 0 < turned < found["head_dim"]:
        rope["partial_rotary_factor"] = found["partial_rotary_factor"] = turned / found["head_dim"]
    found |= _experts(file, get, kind) if get("expert_count", int, 0) else {}
    window = get("attention.sliding_window", int, None)
    if window and found["model_type"] == "llama":
        found |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    found |= {"sliding_window": window} if window and kind in ("gemma3_text", "phi3", "llama") else {}
    if kind == "gemma3_text":
        full = {"rope_type": "default", "rope_theta": 10000.0}
        found["rope_parameters"] = {"full_attention": rope, "sliding_attention": full}
        scalar = gguf_names.gemma_scalar(found["num_hidden_layers"], width, heads, found["head_dim"])
        found |= {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}
    for key in ("bos", "eos"):
        found[f"{key}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    found["pad_token_id"] = file.metadata.get("tokenizer.ggml.padding_token_id")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if type(found[key]) is not int or not 0 <= found[key] < embedding.shape[0]:
            found[key] = None
    _require_shapes(file, found)
    return found


def _rope(file: gguf.File, get: Callable[..., Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": get("rope.freq_base", float, 10000.0), "rope_type": "default"}
    scaling = get("rope.scaling.type", str, "none")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": get("rope.scaling.factor", float)}
    if gguf_rope.FREQS in file.infos:
        rope |= llama3_settings(file)
    if gguf_rope.LONG in file.infos and gguf_rope.SHORT in file.infos:
        rope |= gguf_rope.long_factors(*(file.tensor(n).float() for n in (gguf_rope.LONG, gguf_rope.SHORT)))
        if (attention := get("rope.scaling.attn_factor", float, None)) is not None:
            rope["attention_factor"] = attention
    original = get("rope.scaling.original_context_length", int, None)
    if original and rope["rope_type"] != "llama3":
        rope["original_max_position_embeddings"] = original
    return rope


def _experts(file: gguf.File, get: Callable[..., Any], kind: str) -> dict[str, Any]:
    """What a model with experts has more in its config."""
    count, used = get("expert_count", int), get("expert_used_count", int)
    own: dict[str, Any]
    if kind == "llama":
        own = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": count}
    elif kind == "qwen3_moe":
        own = {"num_experts": count, "moe_intermediate_size": get("expert_feed_forward_length", int)}
        own |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        raise RequestError(f"{file.path}: {kind} with experts cannot be read; llama and qwen3moe can")
    return own | {"num_experts_per_tok": used}


def _require_shapes(file: gguf.File, c: Mapping[str, Any]) -> None:
    """CheckpointError unless every block has the same weights, of the shapes that the config gives them."""
    width, inner, size = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    if file.infos["token_embd.weight"].shape[1] != width:
        raise CheckpointError(f"{file.path}: the embedding is not {width} wide; download it again")
    shapes: dict[str, tuple[Any, ...]] = {"attn_q": (q, width), "attn_k": (kv, width), "attn_v": (kv, width)}
    shapes["attn_output"] = (width, q)
    shapes |= {"attn_q_norm": (size,), "attn_k_norm": (size,), "attn_qkv": (q + 2 * kv, width)}
    experts = c.get("num_local_experts") or c.get("num_experts") or 0
    each = c.get("moe_intermediate_size", inner)
    shapes |= {"ffn_gate_inp": (experts, width), "ffn_down_exps": (experts, width, each)}
    shapes |= {"ffn_gate_exps": (experts, each, width), "ffn_up_exps": (experts, each, width)}
    fused = "blk.0.attn_qkv.weight" in file.infos
    shapes |= {"ffn_gate": (inner, width), "ffn_up": (2 * inner if fused else inner, width), "ffn_down": (width, inner)}
    blocks: dict[int, set[str]] = {}
    for name, info in file.infos.items():
        if found := _WEIGHT.fullmatch(name):
            role = found[2]
            blocks.setdefault(int(found[1]), set()).add(role)
            wanted = shapes.get(role, (width,) if role.endswith("norm") else None)
            if wanted is None or info.shape != wanted:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} has shape {info.shape}, the metadata says {wanted}"
                )
    count = c["num_hidden_layers"]
    needed = {"attn_norm", "attn_output", "ffn_norm"} | ({"attn_qkv"} if fused else {"attn_q", "attn_k", "attn_v"})
    if experts:
        needed |= {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    else:
        needed |= {"ffn_up", "ffn_down"} if fused else {"ffn_gate", "ffn_up", "ffn_down"}
    if len(blocks) != count or max(blocks, default=-1) != count - 1:
        raise CheckpointError(f"{file.path}: the metadata says {count} blocks, the file has {len(blocks)}")
    for i, roles in sorted(blocks.items()):
        if not needed <= roles or roles != blocks[0]:
            lacking = min((needed | blocks[0]) - roles, default="") or min(roles - blocks[0])
            raise CheckpointError(f"{file.path}: block {i} and the others differ in {lacking}; download it again")


def llama3_settings(file: gguf.File) -> dict[str, Any]:
    """The settings whose factors the file holds: factor from the last of them, the rest Llama 3's own."""
    factor = float(file.tensor("rope_freqs.weight").float().max())
    settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor} | settings


def _getter(file: gguf.File, name: str) -> Callable[..., Any]:
    missing = object()

    def get(key: str, kind: type, default: Any = missing) -> Any:
        value = file.metadata.get(f"{name}.{key}", None)
        if value is None:
            if default is missing and key != "attention.key_length":
                raise CheckpointError(f"{file.path}: key {name}.{key} is missing; download it again")
            return None if default is missing else default
        value = value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, int) and not 0 <= value < 2**31):
            raise CheckpointError(f"{file.path}: key {name}.{key} is {str(value)[:40]}, not a {kind.__name__}")
        return value

    return get
