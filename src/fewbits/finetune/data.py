"""From a file or a data set of the hub to rows of tokens with labels.

``.jsonl``, ``.parquet`` and ``hub:`` hold one example per row: ``messages`` (through the tokenizer's chat template),
``prompt`` and ``completion``, or ``text``; any other file is plain text, cut into rows. A label of -100 is not learned:
prompts, what the user says, and the first token of every example, which nothing precedes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FetchError, RequestError
from fewbits.finetune.base import Rows
from fewbits.model import assets
from fewbits.model.locate import first_line

IGNORED = -100
OPEN = 64
"""Unfinished rows that packing looks at for each example."""
KINDS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
HUB = "hub:"
HUB_FORM = "hub:OWNER/NAME[@CONFIG][:SPLIT], as hub:org/chats:train[:1000]"


@dataclass(frozen=True)
class Example:
    """``ids`` and ``labels`` of equal length, at least 2."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Row:
    """Examples that share one row, as tensors int64 ``[T]``: ``ids``, ``labels``, and ``positions`` from 0 in each."""

    ids: Tensor
    labels: Tensor
    positions: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Row:
        ids = [i for e in examples for i in e.ids]
        labels = [x for e in examples for x in (IGNORED, *e.labels[1:])]
        positions = [p for e in examples for p in range(len(e.ids))]
        return cls(*(torch.tensor(x, dtype=torch.int64) for x in (ids, labels, positions)))


def read(data: str | Path, tokenizer: Any, how: Rows) -> list[Row]:
    """The rows of a file, of a fetched text by its name, or of a data set ``hub:OWNER/NAME[@CONFIG][:SPLIT]``.

    Raises RequestError, naming the line that is wrong, and FetchError when the hub cannot be reached.
    """
    if str(data).startswith(HUB):
        entries = _hub(str(data))
    else:
        path = _path(data)
        if path.suffix not in (".jsonl", ".parquet"):
            return _text_rows(path, tokenizer, how.seq_len)
        entries = _lines(path) if path.suffix == ".jsonl" else _table(path)
    examples = [example for place, entry in entries if (example := _example(place, entry, tokenizer, how)) is not None]
    if not examples:
        raise RequestError(f"{data} holds no examples; give rows (of .jsonl: an object per line) with {_kinds()}")
    return [Row.of(group) for group in (_packed(examples, how.seq_len) if how.packing else [[e] for e in examples])]


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """A batch ``[B, T]``, short rows filled up at the end. Positions restart at 0 where a new example begins, which is
    how transformers' masks tell examples apart: there is no attention mask.
    """
    longest = max(len(r.ids) for r in rows)

    def fill(parts: Iterable[Tensor], value: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(t, (0, longest - len(t)), value=value) for t in parts])

    return {
        "input_ids": fill((r.ids for r in rows), pad),
        "labels": fill((r.labels for r in rows), IGNORED),
        "position_ids": fill((r.positions for r in rows), 0),
    }


# ---- sources ---------------------------------------------------------------------------------------------------------


def _path(data: str | Path) -> Path:
    path = Path(data).expanduser()
    if not path.exists() and str(data) in assets.TEXTS:
        return assets.find_text(str(data))
    if not path.is_file():
        known = ", ".join(assets.TEXTS)
        raise RequestError(f"no data at {str(data)!r}; give a .jsonl, .parquet or text file, {HUB_FORM}, or {known}")
    return path


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line.decode("utf-8"))
            except ValueError:
                raise RequestError(f"{path}:{number} is not JSON; a .jsonl file has one object per line") from None


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise RequestError("parquet files need pyarrow: pip install pyarrow, or give .jsonl") from None
    try:
        entries = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as e:
        raise RequestError(f"{path} is not a parquet file that can be read: {str(e).splitlines()[0][:200]}") from None
    yield from ((f"{path} row {number}", entry) for number, entry in enumerate(entries, 1))


def _hub(data: str) -> Iterator[tuple[str, Any]]:
    """The rows of a data set by huggingface's ``datasets``, which keeps what it downloads and runs no code of it."""
    found = re.fullmatch(r"hub:(?P<name>[^@:]+)(@(?P<config>[^@:]+))?(:(?P<split>.+))?", data)
    if found is None:
        raise RequestError(f"{data!r} is not {HUB_FORM}")
    try:
        import datasets
    except ImportError:
        raise RequestError("data sets of the hub need datasets: pip install datasets, or give a file") from None
    try:
        table = datasets.load_dataset(found["name"], found["config"], split=found["split"] or "train")
    except ConnectionError as e:
        raise FetchError(f"{data}: the hub cannot be reached ({first_line(e)}); give a file") from e
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise RequestError(f"{data} cannot be loaded: {first_line(e)}; give {HUB_FORM}") from e
    yield from ((f"{data} row {number}", entry) for number, entry in enumerate(table, 1))


def _text_rows(path: Path, tokenizer: Any, length: int) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RequestError(f"{path} is not UTF-8 text (byte {e.start}); convert it to UTF-8") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    if len(ids) < 2:
        raise RequestError(f"{path} holds {len(ids)} tokens, nothing to learn from; give a longer text")
    whole = max(1, len(ids) // length)  # the last tokens, too few for a row, are left out
    parts = (ids[i * length : (i + 1) * length] for i in range(whole))
    return [Row.of([Example(part, part)]) for part in parts]


# ---- examples --------------------------------------------------------------------------------------------------------


def _kinds() -> str:
    return " or ".join(" and ".join(repr(k) for k in kind) for kind in KINDS)


def _example(place: str, entry: Any, tokenizer: Any, how: Rows) -> Example | None:
    kind = next((k for k in KINDS if isinstance(entry, Mapping) and all(entry.get(n) is not None for n in k)), None)
    if kind is None:
        keys = ", ".join(islice(map(str, entry), 8)) if isinstance(entry, Mapping) else type(entry).__name__
        raise RequestError(f"{place} has columns {keys}; give {_kinds()}")
    if kind == ("messages",):
        found = _chat(place, entry["messages"], tokenizer)
    else:
        texts = [entry[k] for k in kind]
        if not all(isinstance(t, str) for t in texts):
            raise RequestError(f"{place}: {' and '.join(kind)} must be text, not {type(texts[-1]).__name__}")
        found = _plain(texts, tokenizer)
    if how.prompts:
        found = Example(found.ids, list(found.ids))
    if len(found.ids) > how.seq_len and not how.truncate:
        raise RequestError(
            f"{place} has {len(found.ids)} tokens, rows have {how.seq_len}; give --seq-len {len(found.ids)}, or "
            "--truncate to cut such rows"
        )
    found = Example(found.ids[: how.seq_len], found.labels[: how.seq_len])
    if all(x == IGNORED for x in found.labels[1:]):
        if how.truncate and len(found.ids) == how.seq_len:
            return None  # its completion lies beyond the cut
        raise RequestError(f"{place} holds no token to learn; its completion is empty")
    return found


def _plain(texts: Sequence[str], tokenizer: Any) -> Example:
    """``[text]`` or ``[prompt, completion]``, each tokenized by itself, between the opening and closing tokens."""
    parts = [tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] if t else [] for t in texts]
    opening = _opening(tokenizer)
    closing = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if not parts[-1]:
        closing = []
    prompt, learned = [*opening, *(parts[0] if len(parts) == 2 else [])], [*parts[-1], *closing]
    return Example(prompt + learned, [IGNORED] * len(prompt) + learned)


def _opening(tokenizer: Any) -> list[int]:
    """The beginning-of-text token where the tokenizer puts one before every text."""
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else []


def _chat(place: str, messages: Any, tokenizer: Any) -> Example:
    """A conversation through the chat template; what the assistant says is learned.

    Which characters those are is found by rendering the conversation up to each answer and past it. An answer that the
    template renders otherwise when more follows (reasoning that is left out of earlier turns) is not learned.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            f"{place} holds chat messages but the tokenizer has no chat template; give 'prompt' and 'completion'"
        )
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise RequestError(f"{place}: 'messages' must be a list of objects with 'role' and 'content'")
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = [
            (len(before), len(after))
            for i, m in enumerate(messages)
            if m["role"] == "assistant"
            for before in [tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)]
            for after in [tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)]
            if whole.startswith(after) and after.startswith(before)
        ]
    except Exception as e:  # templates raise what they like
        raise RequestError(f"{place}: the chat template refuses it: {str(e).strip().splitlines()[0][:200]}") from None
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [any(a <= begin < b for a, b in spans) for begin, _ in encoded["offset_mapping"]]
    ids = list(encoded["input_ids"])
    return Example(ids, [i if yes else IGNORED for i, yes in zip(ids, learned, strict=True)])


def _packed(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Examples in rows, each in the first of the latest ``OPEN`` rows that has room for it."""
    rows: list[list[Example]] = []
    used: list[int] = []
    for e in examples:
        first = max(0, len(rows) - OPEN)
        at = next((i for i in range(first, len(rows)) if used[i] + len(e.ids) <= length), None)
        if at is None:
            rows.append([])
            used.append(0)
            at = len(rows) - 1
        rows[at].append(e)
        used[at] += len(e.ids)
    return rows
