"""Tokens: llama.cpp on our files, transformers on the originals and on what we make of a file, all the same."""

from __future__ import annotations

import inspect
import json
import random
import sys
import tokenize
import typing
from pathlib import Path
from typing import Any

import pytest

from fewbits.errors import RequestError
from fewbits.formats import gguf, gguf_import, gguf_model, gguf_splits
from fewbits.model import assets
from fewbits.storage import Checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ggml
from tiny import tiny_model

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 64, "num_hidden_layers": 1}
LOWER = ["fox", "don't", "I'll", "we've", "naïve", "straße", "привет", "мир", "сөз", "中文字符", "日本語", "テスト"]
LOWER += ["한국어", "שלום", "قراءة", "🙂", "👩\u200d👩\u200d👧", "½", "²", "Ⅷ"]
CASED = ["Hello", "WORLD", "camelCase", "HTTPServer", "I'LL", "It'S", "x1", "Über", "ÉCOLE", "Привет", "МИР", "ǅungla"]
CASED += ["हिन्दी", "ภาษาไทย", "e\u0301"]
MARKS = [*"()[]{}.,;:!?'\"/\\-_=+*&^%$#@~`|<>", "...", "->", "==", "//", "«", "»", "—", "。", "¿", "€", "1.5", "3,000"]
NUMBERS = ["0", "7", "42", "365", "2024", "31415926", "٣٤", "१२३"]
SPACES = [" ", " ", " ", " ", "", "", "  ", "   ", "\t", "\n", "\n\n", " \n", "\r\n", "\n  \t", "\u00a0", "\u3000"]
# llama.cpp's own patterns for these two know capitals of ASCII only, and leave combining marks outside words.
ASCII_CASE = ("tekken", "gpt-4o")


def lines(count: int, words: list[str]) -> list[str]:
    """Random texts of letters of many scripts, digits, marks and white space."""
    r = random.Random(7)
    parts = (words, MARKS, NUMBERS)
    found = []
    for _ in range(count):
        some = [r.choice(r.choices(parts, (5, 3, 2))[0]) + r.choice(SPACES) for _ in range(r.randint(1, 20))]
        found.append(r.choice(SPACES) + "".join(some))
    return found


def code(count: int) -> list[str]:
    """Lines of Python, and the same as larger pieces."""
    text = inspect.getsource(tokenize) + inspect.getsource(typing)
    some = text.splitlines(keepends=True)[:count]
    return some + ["".join(some[i : i + 50]) for i in range(0, count, 50)]


def agree(reader: Any, tokenizer: Any, texts: list[str]) -> None:
    for text in texts:
        want = tokenizer(text, add_special_tokens=False)["input_ids"]
        got = reader.tokenize(text)
        assert got == want, (text, tokenizer.convert_ids_to_tokens(got), tokenizer.convert_ids_to_tokens(want))


def written(folder: Path, vocabulary: int) -> Path:
    """A file of a tiny model with the tokenizer in ``folder``."""
    tiny_model("llama", folder, vocab_size=vocabulary, **SIZES)
    path = folder / "m.gguf"
    gguf_model.prepare(folder, [Checkpoint.open(folder)], "f16").write(path)
    return path


def trained(folder: Path, name: str) -> Any:
    """A byte-level tokenizer of 1,000 tokens that cuts words as ``name`` says, with two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.decoder = decoders.ByteLevel()
    described = json.loads(inner.to_str())
    described["pre_tokenizer"] = gguf_splits.described(gguf_splits.SPLITS[name])
    described["model"]["ignore_merges"] = gguf_splits.SPLITS[name].whole
    inner = Tokenizer.from_str(json.dumps(described))
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(lines(200, LOWER + CASED) + code(300), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("name", gguf_splits.SPLITS)
def test_every_pre_tokenizer(name, tmp_path):
    ggml.library()
    from transformers import AutoTokenizer

    from fewbits.runtime.llamacpp import LlamaCpp

    tokenizer = trained(tmp_path, name)
    path = written(tmp_path, 1000)
    assert gguf.read(path).metadata["tokenizer.ggml.pre"] == name
    texts = lines(300, LOWER if name in ASCII_CASE else LOWER + CASED) + code(300)
    texts += ["<s>one</s> two", "</s></s>", "a<s> b"]
    (tmp_path / "back").mkdir()
    gguf_import.write_tokenizer(gguf.read(path), tmp_path / "back")
    with LlamaCpp(path) as reader:
        agree(reader, tokenizer, texts)
        agree(reader, AutoTokenizer.from_pretrained(tmp_path / "back"), texts)


def test_a_sentencepiece_vocabulary(tmp_path):
    ggml.library()
    from transformers import AutoTokenizer

    from fewbits.runtime.llamacpp import LlamaCpp

    tokenizer = sentencepiece(tmp_path)
    path = written(tmp_path, len(tokenizer))
    assert gguf.read(path).metadata["tokenizer.ggml.model"] == "llama"
    texts = [t for t in lines(300, LOWER + CASED) + code(300) if t]
    (tmp_path / "back").mkdir()
    gguf_import.write_tokenizer(gguf.read(path), tmp_path / "back")
    with LlamaCpp(path) as reader:
        agree(reader, tokenizer, texts)
        agree(reader, AutoTokenizer.from_pretrained(tmp_path / "back"), texts)


def sentencepiece(folder: Path) -> Any:
    """A BPE with byte fallback whose merges are every way to make a piece of two others, as Llama 2's are."""
    from tokenizers import SentencePieceBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    trainer = SentencePieceBPETokenizer()
    trainer.train_from_iterator(
        lines(200, LOWER + CASED) + code(300), 800, show_progress=False, special_tokens=["<unk>"]
    )
    learned = json.loads(trainer.to_str())["model"]
    order = [a + b for a, b in learned["merges"]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *order]
    tokens += [t for t in learned["vocab"] if t not in tokens]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [[t[:k], t[k:]] for t in order for k in range(1, len(t)) if t[:k] in vocab and t[k:] in vocab]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t} | flags for i, t in enumerate(tokens[:3])],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"}
        | {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "dropout": None}
        | {"continuing_subword_prefix": None, "end_of_word_suffix": None},
    }
    inner = Tokenizer.from_str(json.dumps(described))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("text", ["wikitext2", "code"])
def test_smollm2_on_the_texts_of_the_cache(text, tmp_path):
    """With SmolLM2 and the texts in the cache: its own tokenizer, a thousand lines of each, and 200 kB at once."""
    ggml.library()
    from transformers import AutoTokenizer

    from fewbits.runtime.llamacpp import LlamaCpp

    source = assets.cache_dir() / "smollm2-135m"
    folder = assets.cache_dir() / assets.TEXTS[text]
    file = next((f for f in (folder / f"{text}.utf8", folder / "wikitext2-test.txt") if f.is_file()), None)
    if file is None or not (source / "tokenizer.json").is_file():
        pytest.skip("the cache has no smollm2-135m, or not this text")
    content = file.read_text(encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    path = written(tmp_path, 49152)
    with LlamaCpp(path) as reader:
        tokenizer = AutoTokenizer.from_pretrained(source)
        agree(reader, tokenizer, [*content.splitlines(keepends=True)[:1000], content[:200_000]])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer has no name in GGUF"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": False}}, "pre-tokenizer has no name in GGUF"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer of type Lowercase"),
    ],
)
def test_what_readers_would_tokenize_otherwise_is_refused(part, message, tmp_path):
    trained(tmp_path, "gpt-2")
    file = tmp_path / "tokenizer.json"
    described = json.loads(file.read_text()) | part
    if "pre_tokenizer" in part:
        described["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [part["pre_tokenizer"], gguf_splits.described(gguf_splits.SPLITS["gpt-2"])],
        }
    file.write_text(json.dumps(described))
    with pytest.raises(RequestError, match=message):
        written(tmp_path, 1000)
