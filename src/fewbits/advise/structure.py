"""The names and shapes of a checkpoint against the model that its config.json describes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fewbits.advise.contents import stays_dense
from fewbits.advise.finding import Finding
from fewbits.advise.headers import Imagined
from fewbits.errors import FewbitsError
from fewbits.model import find_family, is_linear, locate, match, unstack_experts

# What old checkpoints hold although every reader computes it.
_COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|attn\.(masked_)?bias|masked_bias)$")


def check_names(
    path: Path, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], packed: set[str]
) -> Iterator[Finding]:
    """``shapes`` of every tensor, a quantized module's as that of its ``<module>.weight``; ``packed`` are
    these modules.
    """
    plain = {k: v for k, v in raw.items() if k != "quantization_config"}
    try:
        config = locate.config(path, plain, trust_remote_code=False)
        model = locate.skeleton(config)
    except FewbitsError as e:
        yield Finding("config", "config.json", str(e))
        return
    rename, prefix = locate.renaming(model), str(model.base_model_prefix)
    linears = {n for n, m in model.named_modules() if is_linear(m)}
    unstack_experts(model)
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    parameters = [n for n, _ in model.named_parameters()]
    headers = cast(Any, Imagined(shapes, torch.float32))
    family = find_family(config.get_text_config().model_type)
    slots, rest = match(headers, wanted, prefix, family.names, rename)
    tied = dict(model.all_tied_weights_keys)  # type: ignore[arg-type]
    for name in rest:
        if not _COMPUTED.fullmatch(name):
            yield Finding("unexpected tensor", name, "the model of config.json has no place for it")
    for name in parameters:
        others = {tied.get(name, ""), *(t for t, s in tied.items() if s == name)}
        if name not in slots and not others & set(slots):
            yield Finding("missing tensor", name, "the model of config.json needs it")
    for name, slot in slots.items():
        found = slot.shape(headers)
        if tuple(found) != tuple(wanted[name]):
            message = f"it is {list(found)}, config.json wants {list(wanted[name])}"
            yield Finding(
                "wrong shape", slot.stored.removesuffix(".weight") if _in(slot.stored, packed) else slot.stored, message
            )
    yield from _left_dense(raw, slots, linears, packed, model)


def _in(stored: str, packed: set[str]) -> bool:
    return stored.removesuffix(".weight") in packed


def _left_dense(
    raw: Mapping[str, Any], slots: Mapping[str, Any], linears: set[str], packed: set[str], model: nn.Module
) -> Iterator[Finding]:
    """Linear layers of the blocks that are dense although readers will build them quantized."""
    described = raw.get("quantization_config")
    if not packed or not isinstance(described, Mapping):
        return
    blocks = locate.find_blocks(model)
    for name in sorted(linears):
        slot = slots.get(f"{name}.weight")
        if slot is None or not name.startswith(blocks) or slot.expert is not None:
            continue
        module = slot.disk.removesuffix(".weight")
        if module not in packed and not stays_dense(described, str(described.get("quant_method")), module):
            yield Finding("config mismatch", slot.stored, "it is dense, and the configuration does not say so")


def check_tokenizer(path: Path, rows: int, embedding: str) -> Iterator[Finding]:
    """A vocabulary may be smaller than the embedding (padding), never larger."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = described["model"]["vocab"]
        numbers = vocabulary.values() if isinstance(vocabulary, Mapping) else range(len(vocabulary))
        highest = max([*numbers, *(t["id"] for t in described.get("added_tokens") or ())], default=-1)
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Finding("tokenizer", "tokenizer.json", "it cannot be read; restore it from the original model")
        return
    if highest >= rows:
        yield Finding("vocabulary", embedding, f"it has {rows} rows, the tokenizer has tokens up to {highest}")
