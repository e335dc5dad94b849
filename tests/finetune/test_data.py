"""From files to rows: what is learned, what is packed, and what is refused in one line."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewbits.errors import FetchError, RequestError
from fewbits.finetune import Rows
from fewbits.finetune.data import IGNORED, collate, read


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def learned(row: Any, tokenizer: Any) -> str:
    return tokenizer.decode([i for i, x in zip(row.ids, row.labels, strict=True) if x != IGNORED])


def test_completions_are_learned_and_prompts_are_not(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "the quick", "completion": " brown fox", "id": 7})
    (row,) = read(file, tokenizer, Rows(32))
    assert tokenizer.decode(row.ids) == "the quick brown fox</s>"
    assert learned(row, tokenizer) == " brown fox</s>"
    assert row.positions.tolist() == list(range(len(row.ids)))
    (row,) = read(file, tokenizer, Rows(32, prompts=True))
    assert learned(row, tokenizer) == tokenizer.decode(row.ids[1:])  # nothing precedes the first token


def test_what_the_assistant_says_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    talk = [("system", "the"), ("user", "quick"), ("assistant", "brown"), ("user", "fox"), ("assistant", "jumps")]
    file = write(tmp_path / "a.jsonl", {"messages": [{"role": r, "content": c} for r, c in talk]})
    (row,) = read(file, tokenizer, Rows(128))
    assert tokenizer.decode(row.ids) == "".join(f"<{r}>{c}\n" for r, c in talk)
    assert learned(row, tokenizer) == "brown\njumps\n"


def test_text_is_cut_into_rows(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the quick brown fox jumps " * 20)
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    rows = read(file, tokenizer, Rows(16))
    assert [i for r in rows for i in r.ids.tolist()] == ids[: len(ids) // 16 * 16]
    assert all(r.labels.tolist() == [IGNORED, *r.ids[1:].tolist()] for r in rows)


def test_packing_keeps_every_example_whole(tmp_path: Path, tokenizer: Any, examples: Path) -> None:
    alone, packed = (read(examples, tokenizer, Rows(40, packing=p)) for p in (False, True))
    assert len(alone) == 60 and len(packed) < 30 and max(len(r.ids) for r in packed) <= 40
    found = []
    for r in packed:
        starts = [*(r.positions == 0).nonzero()[:, 0].tolist(), len(r.ids)]
        for a, b in itertools.pairwise(starts):
            assert r.positions[a:b].tolist() == list(range(b - a)) and r.labels[a] == IGNORED
            found.append((r.ids[a:b].tolist(), r.labels[a:b].tolist()))
    assert sorted(found) == sorted((r.ids.tolist(), r.labels.tolist()) for r in alone)


def test_batches_are_filled_up_with_what_is_not_learned(tokenizer: Any, examples: Path) -> None:
    rows = read(examples, tokenizer, Rows(40, packing=False))[:2]
    batch = collate(rows, pad=9)
    short, long = sorted(rows, key=lambda r: len(r.ids))
    at = next(i for i, r in enumerate(rows) if r is short)
    assert batch["input_ids"].shape == (2, len(long.ids))
    assert batch["input_ids"][at, len(short.ids) :].tolist() == [9] * (len(long.ids) - len(short.ids))
    assert set(batch["labels"][at, len(short.ids) :].tolist()) <= {IGNORED}


def test_parquet(tmp_path: Path, tokenizer: Any, examples: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in examples.read_text().splitlines()]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    ours, theirs = (read(p, tokenizer, Rows(64)) for p in (tmp_path / "a.parquet", examples))
    assert [r.ids.tolist() for r in ours] == [r.ids.tolist() for r in theirs]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(RequestError, match="not a parquet file"):
        read(tmp_path / "b.parquet", tokenizer, Rows())


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        ("hub:org/chats", ("org/chats", None, "train")),
        ("hub:org/chats@en:test", ("org/chats", "en", "test")),
        ("hub:org/chats:train[:2]", ("org/chats", None, "train[:2]")),
    ],
)
def test_a_data_set_of_the_hub_by_its_name(
    data: str, asked: tuple[str, str | None, str], tokenizer: Any, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is played, so that what we ask of it is tested where it is not installed."""
    seen = []

    def load_dataset(name: str, config: str | None, split: str) -> list[Any]:
        seen.append((name, config, split))
        return [json.loads(line) for line in examples.read_text().splitlines()]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    ours, theirs = (read(p, tokenizer, Rows(64)) for p in (data, examples))
    assert [r.ids.tolist() for r in ours] == [r.ids.tolist() for r in theirs]
    assert seen == [asked]


@pytest.mark.parametrize(
    ("error", "refused", "message"),
    [
        (ConnectionError("no route\nmore"), FetchError, "cannot be reached .*no route.*; give a file"),
        (ValueError("Unknown split"), RequestError, "cannot be loaded: .*Unknown split.*; give hub:OWNER"),
        (FileNotFoundError("no such data set"), RequestError, "no such data set"),
    ],
)
def test_a_data_set_that_cannot_be_had(
    error: Exception, refused: type[Exception], message: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    known = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, exceptions=known))
    with pytest.raises(refused, match=message):
        read("hub:org/chats", tokenizer, Rows())


@pytest.mark.parametrize("data", ["hub:", "hub:@x", "hub:a@", "hub:a:"])
def test_a_name_that_is_none(data: str, tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="is not hub:OWNER/NAME"):
        read(data, tokenizer, Rows())


def test_a_data_set_through_the_library_itself(tokenizer: Any, examples: Path) -> None:
    pytest.importorskip("datasets")
    ours, theirs = (read(p, tokenizer, Rows(64)) for p in (f"hub:{examples.parent}", examples))
    assert [r.ids.tolist() for r in ours] == [r.ids.tolist() for r in theirs]
    with pytest.raises(RequestError, match="cannot be loaded"):
        read(f"hub:{examples.parent}:nowhere", tokenizer, Rows())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no examples"),
        ("\n\n", "holds no examples"),
        ("{]\n", ":1 is not JSON"),
        ('{"prompt": "a"}\n', ":1 has columns prompt; give 'messages' or 'prompt' and 'completion' or 'text'"),
        ('{"prompt": "a", "completion": "b"}\n{"question": "a", "answer": "b"}\n', ":2 has columns question, answer"),
        ("[1]\n", ":1 has columns list"),
        ('{"prompt": "a", "completion": 3}\n', "must be text, not int"),
        ('{"prompt": "a", "completion": ""}\n', "no token to learn"),
        (json.dumps({"text": "fox " * 99}) + "\n", ":1 has 200 tokens, rows have 32; give --seq-len 200"),
        ('{"messages": [1]}\n', "must be a list of objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no token to learn"),
    ],
)
def test_bad_data_is_named_in_one_line(tmp_path: Path, tokenizer: Any, text: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(RequestError) as e:
        read(file, tokenizer, Rows(32))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_other_files(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="no data at"):
        read(tmp_path / "none", tokenizer, Rows())
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        read(tmp_path / "a.txt", tokenizer, Rows())
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(RequestError, match="0 tokens"):
        read(tmp_path / "b.txt", tokenizer, Rows())


def test_long_rows_can_be_cut(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "fox " * 99}, {"prompt": "fox " * 99, "completion": "dog"})
    (row,) = read(file, tokenizer, Rows(32, truncate=True))  # the second one's completion lies beyond the cut
    assert len(row.ids) == 32


def test_no_template_says_so(tmp_path: Path, dense: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(dense)
    plain.chat_template = None
    file = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(RequestError, match="no chat template"):
        read(file, plain, Rows())
