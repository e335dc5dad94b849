"""Calibration rows: the tokens of a text from its start, cut into consecutive rows of equal length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FetchError, RequestError
from fewbits.model import assets
from fewbits.storage import Checkpoint

LONGEST_TOKEN = 32
"""Characters per token that no text exceeds on average; only so much of a large file is read."""

Spec = str | Path | Sequence[str] | None


def rows(tokenizer: Any, spec: Spec = None, samples: int = 128, seq_len: int = 512) -> Tensor:
    """``samples`` rows of ``seq_len`` tokens, int64; no special tokens are added.

    ``spec`` is a text file, a ``.jsonl`` file (``text`` or chat ``messages`` per line), a ``.safetensors`` file with
    ``ids [n, seq_len]``, a list of texts, or the name of a fetched text (c4, wiki, code); None stands for c4.
    Raises RequestError when there is no such text or too little of it.
    """
    if samples < 1 or seq_len < 1:
        raise RequestError(f"samples {samples} and seq-len {seq_len} given; both must be at least 1")
    if isinstance(spec, str | Path | None):
        path = _path(spec)
        if path.suffix == ".safetensors":
            return _stored(path, samples, seq_len)
        label, text = str(path), _read(path, tokenizer, samples * seq_len)
    else:
        label, text = f"{len(spec)} texts", "\n\n".join(spec)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // seq_len
    if available < samples:
        raise RequestError(_too_little(label, len(ids), available, samples, seq_len))
    return torch.tensor(ids[: samples * seq_len], dtype=torch.int64).view(samples, seq_len)


def _too_little(label: str, tokens: int, available: int, samples: int, seq_len: int) -> str:
    if tokens == 0:
        return f"calibration text {label} is empty; give a text of at least {samples * seq_len} tokens"
    if available == 0:
        return (
            f"calibration text {label} has {tokens} tokens, fewer than one row of {seq_len}; "
            f"give a longer text or --seq-len {tokens}"
        )
    return (
        f"calibration text {label} has {tokens} tokens, {available} rows of {seq_len} where {samples} were asked for; "
        f"give more text or --samples {available}"
    )


def _path(spec: str | Path | None) -> Path:
    name = "c4" if spec is None else str(spec)
    if name in assets.TEXTS:
        try:
            return assets.find_text(name)
        except FetchError as e:
            raise RequestError(
                f"calibration text {name!r} is not here and cannot be fetched ({e}); "
                f"run `fewbits fetch {assets.TEXTS[name]}` with a network, or give a text file with --calibration"
            ) from e
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(assets.TEXTS)
        raise RequestError(
            f"no such calibration text: {name}; give a text, .jsonl or .safetensors file, or one of {known}"
        )
    return path


def _read(path: Path, tokenizer: Any, tokens: int) -> str:
    try:
        with path.open(encoding="utf-8") as f:
            if path.suffix == ".jsonl":
                return "\n\n".join(_entries(path, f, tokenizer, tokens * LONGEST_TOKEN))
            return f.read(tokens * LONGEST_TOKEN)
    except UnicodeDecodeError as e:
        raise RequestError(f"calibration text {path} is not UTF-8 text (byte {e.start}); give a text file") from e
    except OSError as e:
        raise RequestError(f"calibration text {path} cannot be read: {e.strerror}") from e


def _entries(path: Path, lines: Iterable[str], tokenizer: Any, most: int) -> Iterable[str]:
    total = 0
    for number, line in enumerate(lines, 1):
        if total > most:
            return
        if line.strip():
            text = _entry(f"{path}:{number}", line, tokenizer)
            total += len(text)
            yield text


def _entry(place: str, line: str, tokenizer: Any) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        raise RequestError(f"{place} is not JSON; a .jsonl file has one object per line") from None
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return entry["text"]
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise RequestError(
                f"{place} holds chat messages but the model's tokenizer has no chat template; give plain text"
            )
        return tokenizer.apply_chat_template(entry["messages"], tokenize=False)
    keys = ", ".join(islice(entry, 5)) if isinstance(entry, dict) else type(entry).__name__
    raise RequestError(f"{place} has neither 'text' nor 'messages' (found: {keys})")


def _stored(path: Path, samples: int, seq_len: int) -> Tensor:
    file = Checkpoint.open(path)
    if "ids" not in file or len(file.shape("ids")) != 2 or file.dtype("ids") not in (torch.int32, torch.int64):
        raise RequestError(f"{path} holds no integer tensor 'ids' of shape [rows, tokens]")
    available, length = file.shape("ids")
    if length != seq_len:
        raise RequestError(f"{path} has rows of {length} tokens, not {seq_len}; give --seq-len {length}")
    if available < samples:
        raise RequestError(f"{path} has {available} rows where {samples} were asked for; give --samples {available}")
    return file.tensor("ids")[:samples].to(torch.int64, copy=True)
