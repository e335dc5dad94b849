"""A GGUF file as a transformers directory: the inverse of ``gguf_model``, tensors decoded to a dense dtype."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits import storage
from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import gguf, gguf_model, gguf_names, gguf_splits, gguf_tokenizer
from fewbits.formats.gguf_config import config_of

SHARD = 2_000_000_000
_BLOCK = re.compile(r"blk\.(\d{1,6})\.([a-z0-9_]+)\.(weight|bias)")


def convert(path: str | Path, out: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the model of a GGUF file into the new directory ``out``: config, tokenizer, safetensors in ``dtype``.

    Raises RequestError for an architecture that we do not know, CheckpointError for a file that does not fit it.
    """
    file = gguf.read(path)
    config = config_of(file)
    family = gguf_names.FAMILIES[config["model_type"]]
    out.mkdir(parents=True, exist_ok=True)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None}
    (out / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    write_tokenizer(file, out)
    parts: list[Path] = []
    held: dict[str, Tensor] = {}
    size = 0
    for name in file.infos:
        if (target := plain_name(name, family)) is None:
            continue
        t = tensor(file, name, config, family).to(dtype)
        held |= spread(target, t)
        size += t.nbytes
        file.release()
        if size > SHARD:
            parts.append(_part(out, parts, held))
            held, size = {}, 0
    if held:
        parts.append(_part(out, parts, held))
    storage.merge(parts, out)
    for p in parts:
        p.unlink()
    return out


def _part(out: Path, parts: list[Path], held: Mapping[str, Tensor]) -> Path:
    path = out / f"part-{len(parts):05}.safetensors.tmp"
    storage.save(path, held)
    return path


def plain_name(name: str, f: gguf_names.Family) -> str | None:
    """Transformers' name of a tensor; None for one that transformers computes. Raises CheckpointError."""
    if inside := _BLOCK.fullmatch(name):
        number, role, leaf = inside.groups()
        local = next((k for k, v in f.inside.items() if v == role), None)
        if local is not None:
            return f"model.layers.{number}.{local}.{leaf}"
    module, _, leaf = name.rpartition(".")
    if module in ("rope_freqs", "rope_factors_long", "rope_factors_short"):
        return None
    local = next((k for k, v in gguf_names.OUTSIDE.items() if v == module), None)
    if local is None:
        raise CheckpointError(f"tensor {name[:80]!r} has no place in a {f.name} model")
    return f"{local}.{leaf}" if local == "lm_head" else f"model.{local}.{leaf}"


def expert_name(name: str, number: int) -> str:
    """Transformers' name of one expert's weight, from the name for all of them."""
    stem, _, local = name.removesuffix(".weight").rpartition(".")
    return f"{stem}.{number}.{local}.weight"


def spread(name: str, t: Tensor) -> dict[str, Tensor]:
    """A tensor under its name, or what is stacked in it under the names of the experts."""
    return {name: t} if t.ndim < 3 else {expert_name(name, i): part for i, part in enumerate(t)}


def tensor(file: gguf.File, name: str, config: Mapping[str, Any], f: gguf_names.Family) -> Tensor:
    """A tensor as transformers wants it, float32."""
    t = file.tensor(name).float()
    role = name.split(".")[2] if name.startswith("blk.") else ""
    if f.permute and role in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if role == "attn_q" else "num_key_value_heads"]
        if len(t) % (2 * heads):
            raise CheckpointError(f"tensor {name!r} has {len(t)} rows, which {heads} heads cannot share")
        t = t[torch.argsort(gguf_model.neighbours(len(t), heads))]
    return t - 1 if f.one_plus and "norm" in name else t


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def write_tokenizer(file: gguf.File, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, where the file has them."""
    m = file.metadata
    tokens, kinds = m.get("tokenizer.ggml.tokens"), m.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens:
        return
    kinds = kinds if isinstance(kinds, list) and len(kinds) == len(tokens) else [gguf_tokenizer.NORMAL] * len(tokens)
    described = (_byte_level if m.get("tokenizer.ggml.model") == "gpt2" else _sentencepiece)(file, tokens, kinds)
    special = (gguf_tokenizer.CONTROL, gguf_tokenizer.UNKNOWN, gguf_tokenizer.USER)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described["added_tokens"] = [
        {"id": i, "content": t} | flags | {"special": k != gguf_tokenizer.USER}
        for i, (t, k) in enumerate(zip(tokens, kinds, strict=True))
        if k in special
    ]
    described |= {"version": "1.0", "truncation": None, "padding": None}
    names = {key: m.get(f"tokenizer.ggml.{name}_token_id") for key, name in gguf_tokenizer.SPECIAL.items()}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{k}_token": tokens[i] for k, i in names.items() if type(i) is int and i < len(tokens)}
    bos = settings.get("bos_token")
    if m.get("tokenizer.ggml.add_bos_token", m.get("tokenizer.ggml.model") == "llama") and bos:
        described["post_processor"] = _adding(bos, tokens.index(bos))
    (out / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if isinstance(m.get("tokenizer.chat_template"), str):
        (out / "chat_template.jinja").write_text(m["tokenizer.chat_template"], encoding="utf-8")


def _adding(bos: str, i: int) -> dict[str, Any]:
    first, a = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    b = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {bos: {"id": bos, "ids": [i], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, *b], "special_tokens": known}


def _byte_level(file: gguf.File, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    splits = gguf_splits.named(name)
    if splits is None:
        raise RequestError(f"{file.path}: pre-tokenizer {name[:40]!r} is not known; the tokenizer cannot be made")
    merges = file.metadata.get("tokenizer.ggml.merges") or []
    vocabulary = {t: i for i, t in enumerate(tokens)}  # special ones too: without, they would get new ids
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": [m.split(" ", 1) for m in merges]}
    model["ignore_merges"] = splits.whole
    pre, level = gguf_splits.described(splits), {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"model": model, "normalizer": None, "pre_tokenizer": pre, "decoder": level, "post_processor": None}


def _sentencepiece(file: gguf.File, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """A BPE whose merges follow the scores: a pair that makes a better piece is merged first."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"{file.path}: the vocabulary has no scores; download it again")
    keep = (gguf_tokenizer.CONTROL, gguf_tokenizer.USER)
    rank = {t: scores[i] for i, t in enumerate(tokens) if kinds[i] not in keep}
    merges = [
        (-score, rank_left, t[:cut], t[cut:])
        for t, score in rank.items()
        if len(t) < 64
        for cut in range(1, len(t))
        if (rank_left := rank.get(t[:cut])) is not None and t[cut:] in rank
    ]
    merges.sort(key=lambda m: (m[0], -m[1]))
    model: dict[str, Any] = {
        "type": "BPE",
        "vocab": {t: i for i, t in enumerate(tokens)},
        "merges": [[a, b] for _, _, a, b in merges],
    }
    model |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>" if "<unk>" in rank else None}
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "model": model,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "post_processor": None,
    }
