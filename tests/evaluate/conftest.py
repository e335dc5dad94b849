"""A tiny reference, a model that differs from it a little, and a text: made once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps", "all", "day", "long"]
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(600)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model("llama", tmp_path_factory.mktemp("reference"), vocab_size=300)
    tiny_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def changed(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference with noise on every weight."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.03)
    path = tmp_path_factory.mktemp("changed")
    model.save_pretrained(path)
    tiny_tokenizer(path)
    return path
