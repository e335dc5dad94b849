"""Tiny random models of every family, made from transformers' own configs and saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}

OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma3_text": GEMMA,
    "gemma3": {},
    "phi3": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": MOE,
    "qwen3_moe": MOE | {"head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
}
FAMILIES = tuple(OVERRIDES)


def config(family: str, **changes: Any) -> Any:
    """A config of the family: 2 blocks, hidden size 64, 4 heads on 2 key-value heads, 128 tokens."""
    from transformers import CONFIG_MAPPING

    if family == "gpt2":
        small = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
        return CONFIG_MAPPING[family](**small | OVERRIDES[family] | changes)
    fields = COMMON | OVERRIDES[family] | changes
    if family == "gemma3":
        return CONFIG_MAPPING[family](
            text_config=COMMON | GEMMA | changes, vision_config=VISION, mm_tokens_per_image=4, image_token_index=100
        )
    return CONFIG_MAPPING[family](**fields)


def tiny_model(
    family: str, path: Path, dtype: torch.dtype = torch.float32, sharded: bool = False, **changes: Any
) -> Path:
    """Save a random model of ``family`` into ``path`` and return it; norms and biases are random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(config(family, **changes)).float()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
            elif not p.any():  # a router that starts at zero would choose experts by index
                p.normal_(std=0.1)
    model.to(dtype).save_pretrained(path, max_shard_size="60KB" if sharded else "5GB")
    return path


def tiny_tokenizer(
    path: Path, text: str = "the quick brown fox jumps over the lazy dog and sleeps all day long"
) -> Any:
    """A byte-level BPE tokenizer of at most 300 tokens, trained on ``text`` and saved into ``path``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(path)
    return tokenizer
