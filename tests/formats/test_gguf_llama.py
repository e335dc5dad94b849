"""llama.cpp itself runs the files that we write, and computes what transformers computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits.formats import gguf_import, gguf_model
from fewbits.storage import Checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ggml
from tiny import tiny_model, tiny_tokenizer

# Head sizes that llama.cpp's kernels take, and Gemma 3 as it knows it.
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
CHANGES = {
    "gemma3_text": {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 32, "sliding_window": 512}
}
CHANGES["qwen3_moe"] = {"mlp_only_layers": [], "moe_intermediate_size": 256}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]
CHANGES["mistral"] = {"sliding_window": None}


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1 + 0.3 * i for i in range(16)]}
LONG["short_factor"] = [1 + 0.01 * i for i in range(16)]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL divergence of the distributions whose logits are given."""
    a, b = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("mixture", ["f32", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family, mixture, tmp_path):
    ggml.library()
    from transformers import AutoModelForCausalLM

    source = tiny_model(family, tmp_path / "model", **SIZES | CHANGES.get(family, {}))
    tiny_tokenizer(source)
    path = tmp_path / "m.gguf"
    gguf_model.prepare(source, [Checkpoint.open(source)], mixture).write(path)
    back = gguf_import.convert(path, tmp_path / "back", torch.float32)
    ids = np.random.default_rng(0).integers(3, 300, 64).tolist()
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)(torch.tensor([ids])).logits[0].numpy()
    got = ggml.logits(path, ids)
    # llama.cpp rounds activations to 8 bits where weights are quantized, and keys and values to half precision; a token
    # between two experts may then go to the other one.
    bar = 5e-2 if family in ("mixtral", "qwen3_moe") else 5e-3
    assert kl(want, got) < (1e-5 if mixture == "f32" else bar)
    assert want.std() > 0.5


@pytest.mark.parametrize("trained", [32, 512])
def test_long_rope_factors(trained, tmp_path):
    """Phi-3's two sets of factors: llama.cpp takes one by the size of its context, transformers by the text's."""
    ggml.library()
    from transformers import AutoModelForCausalLM

    rope = LONG | {"original_max_position_embeddings": trained}
    changes = SIZES | {"rope_parameters": rope, "original_max_position_embeddings": trained}
    source = tiny_model("phi3", tmp_path / "model", **changes | {"max_position_embeddings": 4 * trained})
    tiny_tokenizer(source)
    path = tmp_path / "m.gguf"
    gguf_model.prepare(source, [Checkpoint.open(source)], "f32").write(path)
    back = gguf_import.convert(path, tmp_path / "back", torch.float32)
    ids = np.random.default_rng(0).integers(3, 300, 64).tolist()
    with torch.no_grad():
        want, again = (
            AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)(torch.tensor([ids])).logits[0].numpy()
            for p in (source, back)
        )
    np.testing.assert_allclose(again, want, atol=2e-5, rtol=1e-4)
    assert kl(want, ggml.logits(path, ids)) < 1e-5
