"""A tiny model with a tokenizer and a chat template, and a file of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("peft")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "sleeps", "all", "day", "long"]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, 300 words, linear layers of 64 and 128 columns: NF4's blocks do not straddle rows."""
    path = tmp_path_factory.mktemp("dense") / "model"
    tiny_model("llama", path, vocab_size=300, intermediate_size=128, max_position_embeddings=128)
    tokenizer = tiny_tokenizer(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(dense: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(dense)


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 prompts with completions of different lengths."""
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    rows = [
        {"prompt": " ".join(WORDS[i % 7 : i % 7 + 3]), "completion": " " + " ".join(WORDS[i % 5 : i % 5 + 2 + i % 4])}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
