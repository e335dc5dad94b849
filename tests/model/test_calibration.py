"""Calibration rows: exactly the text's tokens, in order, or an error that says how many there are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from fewbits.errors import FetchError, RequestError
from fewbits.model import assets, rows
from tests.tiny import tiny_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and sleeps all day long. " * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(TEXT, add_special_tokens=False).input_ids


def test_tokens_from_the_start_in_order(tokenizer, ids, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    got = rows(tokenizer, str(file), samples=5, seq_len=16)
    assert got.dtype == torch.int64 and got.shape == (5, 16)
    assert got.flatten().tolist() == ids[:80]
    assert torch.equal(rows(tokenizer, file, 5, 16), got)
    assert torch.equal(rows(tokenizer, [TEXT], 5, 16), got)


def test_texts_and_jsonl_are_joined_by_an_empty_line(tokenizer, tmp_path):
    texts = ["the quick fox", "over the lazy dog, äöü"]
    expected = tokenizer("\n\n".join(texts), add_special_tokens=False).input_ids
    assert rows(tokenizer, texts, 1, 8)[0].tolist() == expected[:8]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n")
    assert rows(tokenizer, file, 1, 8)[0].tolist() == expected[:8]


def test_chat_messages_use_the_chat_template(tokenizer, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "the lazy dog"}]}))
    with pytest.raises(RequestError, match=r"chat\.jsonl:1 .* no chat template"):
        rows(tokenizer, file, 1, 4)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        got = rows(tokenizer, file, 1, 4)[0].tolist()
    finally:
        tokenizer.chat_template = None
    assert got == tokenizer("<user>the lazy dog", add_special_tokens=False).input_ids[:4]


def test_stored_ids(tokenizer, tmp_path):
    file = tmp_path / "rows.safetensors"
    stored = torch.arange(24).view(4, 6)
    save_file({"ids": stored.int()}, file)
    assert torch.equal(rows(tokenizer, file, 3, 6), stored[:3])
    with pytest.raises(RequestError, match="rows of 6 tokens, not 8; give --seq-len 6"):
        rows(tokenizer, file, 3, 8)
    with pytest.raises(RequestError, match="4 rows where 5 were asked for; give --samples 4"):
        rows(tokenizer, file, 5, 6)
    save_file({"ids": stored.float()}, file)
    with pytest.raises(RequestError, match="no integer tensor 'ids'"):
        rows(tokenizer, file, 3, 6)


def test_too_little_text(tokenizer, ids, tmp_path):
    n = len(ids)
    with pytest.raises(RequestError, match=f"{n} tokens, {n // 16} rows of 16 where 999 .* --samples {n // 16}"):
        rows(tokenizer, [TEXT], 999, 16)
    with pytest.raises(RequestError, match=rf"{n} tokens, fewer than one row of {n + 1}; .* --seq-len {n}"):
        rows(tokenizer, [TEXT], 1, n + 1)
    empty = tmp_path / "empty.txt"
    empty.touch()
    for spec in (empty, [], [""]):
        with pytest.raises(RequestError, match="is empty; give a text of at least 32 tokens"):
            rows(tokenizer, spec, 2, 16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)"),
        ("bad.jsonl", b"not json\n", r"bad\.jsonl:1 is not JSON"),
        ("keys.jsonl", b'{"prompt": "x"}\n', r"neither 'text' nor 'messages' \(found: prompt\)"),
        ("list.jsonl", b"[1]\n", r"\(found: list\)"),
    ],
)
def test_files_that_are_no_text(name, content, message, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        rows(tokenizer, tmp_path / name, 1, 4)


def test_unknown_text_and_senseless_numbers(tokenizer):
    with pytest.raises(RequestError, match=r"no such calibration text: nowhere\.txt; .* c4, wiki, code"):
        rows(tokenizer, "nowhere.txt")
    with pytest.raises(RequestError, match="both must be at least 1"):
        rows(tokenizer, ["x"], 0, 16)


def test_default_text_that_cannot_be_had(tokenizer, monkeypatch):
    def offline(*args, **kwargs):
        raise FetchError("no network")

    monkeypatch.setattr(assets, "fetch", offline)
    with pytest.raises(RequestError, match=r"'c4' is not here .*run `fewbits fetch calibration`"):
        rows(tokenizer)
