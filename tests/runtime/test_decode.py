"""Our decoding loop against transformers' generate, and the command that uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.grids import Int
from fewbits.kernels import qlinear
from fewbits.runtime import decode
from tests.runtime.rtn import write_rtn
from tests.tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 17, 99, 3, 42]])
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


def ours(model: torch.nn.Module, count: int, temperature: float = 0.0) -> list[int]:
    return decode.Decoder(model).run(IDS, count, temperature)


def theirs(model, count: int, **sampling) -> list[int]:
    kwargs = {"max_new_tokens": count, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0, "do_sample": False}
    return model.generate(IDS, **(kwargs | sampling))[0, IDS.shape[1] :].tolist()


def load(family: str, path: Path, dtype: torch.dtype = torch.float32, **changes):
    changes = {"vocab_size": 512, "eos_token_id": None, "tie_word_embeddings": False} | changes
    model, _ = fewbits.load(write_rtn(tiny_model(family, path / "src", **changes), path / "q", "fewbits", Int(4, 32)))
    return model.to(dtype)


@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = load(family, tmp_path, dtype, **({"sliding_window": 64} if family == "mistral" else {}))
    want = theirs(model, 40)
    assert decode.supports(model, 45) and len(set(want)) > 3
    assert ours(model, 40) == want
    assert theirs(model, 40) == want  # stacking left the model as it was


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 1e4,
        },
    ],
    ids=lambda r: r["rope_type"],
)
def test_scaled_rotary_embeddings_and_biases(tmp_path: Path, rope: dict) -> None:
    model = load("llama", tmp_path, rope_parameters=rope, attention_bias=True, mlp_bias=True)
    assert ours(model, 40) == theirs(model, 40)


def test_dense_models_and_head_counts_that_do_not_stack(tmp_path: Path) -> None:
    model, _ = fewbits.load(tiny_model("qwen2", tmp_path / "dense", eos_token_id=None))
    assert ours(model, 30) == theirs(model, 30)
    model = load("llama", tmp_path, hidden_size=60, num_attention_heads=3, num_key_value_heads=1)  # 20 rows of keys
    assert qlinear.stack([m._packed for m in (model.model.layers[0].self_attn.k_proj,) * 2]) is None
    assert ours(model, 30) == theirs(model, 30)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (0, 0.8)])
def test_sampling_draws_as_transformers_does(tmp_path: Path, top_k: int | None, top_p: float | None) -> None:
    model = load("llama", tmp_path)
    model.generation_config.top_k, model.generation_config.top_p = top_k, top_p
    torch.manual_seed(7)
    want = theirs(model, 30, do_sample=True, temperature=1.3)
    torch.manual_seed(7)
    assert ours(model, 30, 1.3) == want


def test_end_of_text_ends(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    free = ours(model, 20)
    end = next(t for t in free if t != free[0])
    model.generation_config.eos_token_id = [511, end]
    assert ours(model, 20) == free[: free.index(end) + 1] == theirs(model, 20)
    assert ours(model, 1) == free[:1]


def test_what_is_not_known_goes_to_transformers(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    model.generation_config.repetition_penalty = 1.5
    assert not decode.supports(model, 10)
    assert decode.generate(model, IDS, 20) == theirs(model, 20)
    windowed = load("mistral", tmp_path / "m")  # sees 8 tokens
    assert decode.supports(windowed, 8) and not decode.supports(windowed, 9)
    assert decode.generate(windowed, IDS, 20) == theirs(windowed, 20)
    other, _ = fewbits.load(tiny_model("gpt2", tmp_path / "g"))
    assert not decode.supports(other, 10) and decode.generate(other, IDS, 6) == theirs(other, 6)


def test_stacked_layers_share_memory_and_keep_their_bits(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 64)
    before = [m.dequantize() for m in (mlp.gate_proj, mlp.up_proj)]
    products = [m(x) for m in (mlp.gate_proj, mlp.up_proj)]
    decode.Decoder(model)
    gate, up = mlp.gate_proj._packed, mlp.up_proj._packed
    assert gate.codes.untyped_storage().data_ptr() == up.codes.untyped_storage().data_ptr()
    assert all(torch.equal(m.dequantize(), w) for m, w in zip((mlp.gate_proj, mlp.up_proj), before, strict=True))
    assert all(torch.equal(m(x), y) for m, y in zip((mlp.gate_proj, mlp.up_proj), products, strict=True))


@pytest.mark.slow
def test_command_in_a_fresh_process(tmp_path: Path) -> None:
    src = tiny_model("llama", tmp_path / "src", vocab_size=300, eos_token_id=None)
    tokenizer = tiny_tokenizer(src)
    path = write_rtn(src, tmp_path / "q", "compressed-tensors", Int(4, 32, symmetric=True, scale="float32"))
    argv = [sys.executable, "-m", "fewbits", "generate", str(path), "the quick brown", "--max-tokens", "3"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, _ = fewbits.load(path)
    ids = tokenizer("the quick brown", return_tensors="pt")["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert done.stdout.rstrip("\n") == "the quick brown" + tokenizer.decode(new[0, ids.shape[1] :])


@pytest.mark.slow
@pytest.mark.skipif("FEWBITS_TEST_MODEL" not in os.environ, reason="FEWBITS_TEST_MODEL names no quantized model")
def test_greedy_tokens_of_a_real_model() -> None:
    model, tokenizer = fewbits.load(os.environ["FEWBITS_TEST_MODEL"])
    for prompt in ("The capital of France is", "Once upon a time there was a little", "def fibonacci(n):\n"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        assert decode.Decoder(model).run(ids, 48) == want[0, ids.shape[1] :].tolist()
