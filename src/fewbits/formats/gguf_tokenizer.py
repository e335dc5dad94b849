"""A fast tokenizer of transformers (``tokenizer.json``) as GGUF metadata.

GGUF keeps the vocabulary and the name of a pre-tokenizer that its readers implement themselves. That name is found from
the pre-tokenizer's own description; one that we do not know is refused, because a wrong name silently changes tokens.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import gguf_splits

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}  # sic: GGUF's spelling


def tokenizer(folder: Path, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Metadata for the tokenizer in ``folder``, one token for each of the ``rows`` of the embedding.

    Raises RequestError when there is none or it cannot be expressed, CheckpointError when it is damaged.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise RequestError(f"{folder} has no tokenizer.json, which a GGUF file needs; save a fast tokenizer there")
    described, settings = _json(file), _json(folder / "tokenizer_config.json")
    try:
        found = _byte_level(described, rows) if _is_byte_level(described) else _sentencepiece(folder, described, rows)
    except RequestError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise CheckpointError(f"{file} is not a tokenizer that can be read: {type(e).__name__} {e}") from e
    ids = {t: i for i, t in enumerate(found["tokenizer.ggml.tokens"])}
    for key, name in SPECIAL.items():
        token = settings.get(f"{key}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        i = ids.get(token) if isinstance(token, str) else config.get(f"{key}_token_id")
        i = i[0] if isinstance(i, list) and i else i
        if type(i) is int and 0 <= i < rows:
            found[f"tokenizer.ggml.{name}_token_id"] = i
    found["tokenizer.ggml.add_bos_token"] = _adds_bos(described, settings, found)
    if template := _template(folder, settings):
        found["tokenizer.chat_template"] = template
    return found


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{file} is not readable JSON: {str(e)[:80]}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return found


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    steps = gguf_splits.steps_of(described.get("pre_tokenizer"), "pretokenizers")
    return described["model"]["type"] == "BPE" and any(s["type"] == "ByteLevel" for s in steps)


def _byte_level(described: Mapping[str, Any], rows: int) -> dict[str, Any]:
    for step in gguf_splits.steps_of(described.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":  # which readers of GGUF leave out: only text that is not in NFC differs
            raise RequestError(f"GGUF cannot express a byte-level tokenizer with a normalizer of type {step['type']}")
    tokens, types = _vocabulary(described["model"]["vocab"].items(), described["added_tokens"], rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
    head = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre_tokenizer(described)}
    found = head | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return found | ({"tokenizer.ggml.merges": merges} if merges else {})


def pre_tokenizer(described: Mapping[str, Any]) -> str:
    """GGUF's name of a byte-level pre-tokenizer. Raises RequestError for one that has no name here."""
    name = gguf_splits.name_of(described)
    if name is None:
        raise RequestError(
            "this tokenizer's pre-tokenizer has no name in GGUF that is known here; "
            f"known: {', '.join(gguf_splits.SPLITS)}, and sentencepiece"
        )
    return name


def _vocabulary(
    vocabulary: Any, added: list[dict[str, Any]], rows: int, types: Mapping[int, int] | None = None
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    for token, i in vocabulary:
        if i < rows:
            tokens[i], kinds[i] = token, (types or {}).get(i, NORMAL)
    for a in added:
        if a["id"] >= rows:
            raise RequestError(f"token {a['content']!r} has id {a['id']}, the embedding has {rows} rows")
        keep = types and types.get(a["id"]) in (UNKNOWN, BYTE)
        tokens[a["id"]] = a["content"]
        kinds[a["id"]] = kinds[a["id"]] if keep else CONTROL if a.get("special") else USER
    return tokens, kinds


def _sentencepiece(folder: Path, described: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Scores from ``tokenizer.model`` when it is there; else a token's score is minus the rank of its merge."""
    model = described["model"]
    if model["type"] == "Unigram":
        pieces = {t: (float(s), NORMAL) for t, s in model["vocab"]}
        vocabulary = {t: i for i, (t, _) in enumerate(model["vocab"])}
    elif model["type"] == "BPE":
        vocabulary = model["vocab"]
        pieces = _by_rank(model)
    else:
        raise RequestError(f"a tokenizer of type {model['type']} cannot be written as GGUF; allowed: BPE, Unigram")
    if (folder / "tokenizer.model").is_file():
        pieces |= dict(proto_pieces((folder / "tokenizer.model").read_bytes()))
    unknown = model.get("unk_token") or next((t for t in ("<unk>",) if t in vocabulary), None)
    types = {i: _piece_type(t, unknown, pieces.get(t, (0.0, NORMAL))[1]) for t, i in vocabulary.items()}
    tokens, kinds = _vocabulary(vocabulary.items(), described["added_tokens"], rows, types)
    added = {a["id"] for a in described["added_tokens"]} - set(vocabulary.values())
    scores = [-1000.0 if i in added else -10000.0 for i in range(rows)]
    for t, i in vocabulary.items():
        if i < rows:
            scores[i] = pieces.get(t, (-10000.0, NORMAL))[0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": _prefixes_space(described),
    }


def _by_rank(model: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge if not isinstance(merge, str) else merge.split(" ", 1)
        found.setdefault(left + right, (-float(rank), NORMAL))
    return dict.fromkeys(model["vocab"], (0.0, NORMAL)) | found


def _piece_type(token: str, unknown: str | None, given: int) -> int:
    if token == unknown:
        return UNKNOWN
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return given


def _prefixes_space(described: Mapping[str, Any]) -> bool:
    steps = gguf_splits.steps_of(described.get("normalizer"), "normalizers")
    steps += gguf_splits.steps_of(described.get("pre_tokenizer"), "pretokenizers")
    return any(
        s["type"] == "Prepend" or (s["type"] == "Metaspace" and s.get("prepend_scheme") != "never") for s in steps
    )


def proto_pieces(raw: bytes) -> Iterator[tuple[str, tuple[float, int]]]:
    """(piece, (score, type)) of a sentencepiece model: field 1 of its protocol buffer is one piece each."""
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            text, score, kind = piece.get(1, b""), piece.get(2, b"\0\0\0\0"), piece.get(3, NORMAL)
            if isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int):
                yield text.decode("utf-8", "replace"), (struct.unpack("<f", score)[0], kind)


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(raw):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 2: None, 5: 4}[key & 7]
            size = varint() if size is None else size
            yield key >> 3, raw[at : at + size]
            at += size


def _adds_bos(described: Mapping[str, Any], settings: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    bos = found.get("tokenizer.ggml.bos_token_id")
    steps = gguf_splits.steps_of(described.get("post_processor"), "processors")
    for step in steps:
        if step["type"] == "TemplateProcessing" and step["single"] and "SpecialToken" in step["single"][0]:
            first = step["single"][0]["SpecialToken"]["id"]
            return bos is not None and found["tokenizer.ggml.tokens"][bos] == first
    return bool(settings.get("add_bos_token", False)) and not steps


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((t["template"] for t in found if t.get("name") == "default"), None)
    return found if isinstance(found, str) else None
