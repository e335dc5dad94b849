"""A whole model as GGUF: from a transformers directory, or from the parts of a run, tensor by tensor.

Weights come dense (``<module>.weight``) or packed (``<module>.ggml_q4_k``: rows of bytes, as the layout stores them).
What llama.cpp wants otherwise than transformers is done here: names, the order of rotary rows, ``1 + w`` in Gemma's
norms, tied heads left out, vectors in float32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import gguf, gguf_blocks, gguf_mixtures, gguf_names, gguf_rope, gguf_tokenizer
from fewbits.formats.gguf import Info
from fewbits.grids import BLOCK_TYPES, Block
from fewbits.storage import Checkpoint

PACKED = "ggml_"
CHUNK = 1 << 22  # weights encoded at a time
Kinds = Callable[[str, tuple[int, ...]], str]


@dataclass(frozen=True)
class Item:
    """A tensor to write and where it comes from: one tensor, one for each expert, or none for what is computed."""

    info: Info
    sources: tuple[tuple[Checkpoint, str], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every weight keeps its value."""
        return all(keeps(checkpoint.dtype(name), self.info.kind) for checkpoint, name in self.sources)


@dataclass(frozen=True)
class Export:
    """A model on its way into a file. ``importance`` (by GGUF's tensor name, float32 ``[in]``) weighs the searches."""

    config: Mapping[str, Any]
    family: gguf_names.Family
    items: tuple[Item, ...]
    metadata: Mapping[str, Any]
    importance: Mapping[str, Tensor]

    def write(self, path: Path, split: int | None = None) -> list[Path]:
        """Write one file, or numbered ones of at most ``split`` bytes of tensors each; returns the paths."""
        parts = _parts([i.info for i in self.items], split)
        items = {i.info.name: i for i in self.items}

        def data(info: Info) -> Iterator[Any]:
            item = items[info.name]
            if not item.sources:
                yield _bytes(gguf_rope.tensors(*_rotary(self.config))[info.name])
            for i, (checkpoint, name) in enumerate(item.sources):
                importance = self.importance.get(info.name)
                if importance is not None and importance.ndim == 2:
                    importance = importance[i]
                yield from self._data(info, checkpoint.tensor(name), name, importance)
                checkpoint.release()

        paths = []
        for k, infos in enumerate(parts):
            metadata, target = dict(self.metadata) if k == 0 else {}, path
            if len(parts) > 1:
                target = path.with_name(f"{path.stem}-{k + 1:05}-of-{len(parts):05}.gguf")
                metadata |= {"split.no": np.uint16(k), "split.count": np.uint16(len(parts))}
                metadata["split.tensors.count"] = np.int32(len(items))
            gguf.write(target, metadata, infos, data)
            paths.append(target)
        return paths

    def _data(self, info: Info, t: Tensor, name: str, importance: Tensor | None) -> Iterator[Any]:
        order = self._order(info)
        t = t if order is None else t[order]
        if name.rpartition(".")[2].startswith(PACKED):
            yield _bytes(t)
            return
        rows = t.reshape(-1, t.shape[-1])
        plus = self.family.one_plus and "norm" in info.name
        step = max(1, CHUNK // rows.shape[1])
        for a in range(0, len(rows), step):
            w = rows[a : a + step].float()
            yield _bytes(encode(w + 1 if plus else w, info.kind, importance))

    def _order(self, info: Info) -> Tensor | None:
        role = info.name.split(".")[2] if info.name.startswith("blk.") else ""
        if not self.family.permute or role not in ("attn_q", "attn_k"):
            return None
        c = gguf_names.text(self.config)
        heads = (
            c["num_attention_heads"] if role == "attn_q" else c.get("num_key_value_heads") or c["num_attention_heads"]
        )
        return neighbours(info.shape[0], heads)


def neighbours(rows: int, heads: int) -> Tensor:
    """Where each row comes from when rotary pairs ``(i, i + half)`` of a head become ``(2 i, 2 i + 1)``."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def encode(w: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """``w`` float32 ``[rows, columns]`` in a type of GGUF: a dense tensor or rows of bytes."""
    if kind in BLOCK_TYPES:
        grid = Block(kind)
        return gguf_blocks.pack(grid, *grid.search(w.contiguous(), importance))
    return w.to(gguf.DENSE[kind][1])


def _bytes(t: Tensor) -> memoryview:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def prepare(
    folder: Path,
    checkpoints: Sequence[Checkpoint],
    mixture: str = "f16",
    importance: Mapping[str, Tensor] | None = None,
    kinds: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Export:
    """Check a model and say what its file will hold. ``folder`` has config.json and the tokenizer.

    ``mixture`` decides the types of dense tensors, ``kinds`` (by GGUF's name) overrides it. Raises RequestError for a
    model that cannot be expressed.
    """
    config = read_config(folder)
    family = gguf_names.family(str(gguf_names.text(config).get("model_type", config.get("model_type"))))
    found = _names(checkpoints, config, family)
    mix = gguf_mixtures.mixture(mixture)
    facts = facts_of(config, "output.weight" not in found, bool(importance))
    items = []
    for name, sources in found.items():
        shape, kind = _shape(name, sources, config)
        kind = kind or (kinds or {}).get(name) or gguf_mixtures.kind_of(mix, name, shape, facts)
        items.append(Item(Info(name, kind, shape), sources))
    for name, factors in gguf_rope.tensors(*_rotary(config)).items():
        items.append(Item(Info(name, "f32", tuple(factors.shape))))
    rows = next((i.info.shape[0] for i in items if i.info.name == "token_embd.weight"), 0)
    if not rows:
        raise CheckpointError(f"{folder} holds no embedding; the model is damaged")
    packed = Counter(i.info.kind for i in items if i.info.kind in BLOCK_TYPES)
    general: dict[str, Any] = {
        "general.architecture": family.name,
        "general.type": "model",
        "general.name": title or folder.name or "model",
        "general.file_type": file_type(packed) if mixture == "f16" and packed else mix.file_type,
    } | ({"general.quantization_version": 2} if packed else {})
    metadata = general | gguf_names.metadata(config, family) | gguf_tokenizer.tokenizer(folder, config, rows)
    return Export(config, family, tuple(items), metadata, importance or {})


def file_type(packed: Counter[str]) -> int:
    """The number of the mixture whose base type is the commonest: what a file of any other mixture states."""
    base = packed.most_common(1)[0][0]
    found = [m.file_type for m in gguf_mixtures.MIXTURES.values() if m.base == base]
    return max(found, default=gguf_mixtures.MIXTURES["q4_k_m"].file_type)


def facts_of(config: Mapping[str, Any], tied: bool, weighted: bool) -> gguf_mixtures.Model:
    """What mixtures ask of a model, from its config.json."""
    c = gguf_names.text(config)
    heads = c["num_attention_heads"]
    queries = heads // (c.get("num_key_value_heads") or heads)
    llama = gguf_names.family(c["model_type"]).name == "llama"
    experts = c.get("num_local_experts") or c.get("num_experts") or 0
    return gguf_mixtures.Model(c["num_hidden_layers"], queries, tied, weighted, llama=llama, experts=experts)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises RequestError when there is none, CheckpointError when it is damaged."""
    file = folder / "config.json"
    if not file.is_file():
        raise RequestError(f"{folder} has no config.json; give a transformers directory")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{file} is not readable JSON: {str(e)[:80]}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return found


def module_name(name: str) -> str:
    """``<module>.weight`` of a packed tensor; any other name as it is."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.weight" if leaf.startswith(PACKED) else name


Sources = tuple[tuple[Checkpoint, str], ...]


def _names(checkpoints: Sequence[Checkpoint], config: Mapping[str, Any], f: gguf_names.Family) -> dict[str, Sources]:
    """By GGUF's name where each tensor comes from; experts in the order of their numbers."""
    found: dict[str, list[tuple[Checkpoint, str]]] = {}
    tied = bool(gguf_names.text(config).get("tie_word_embeddings", f.name == "gemma3"))
    for checkpoint in checkpoints:
        for source in checkpoint.names():
            name = gguf_names.stored_name(module_name(source), f)
            if name is not None and not (tied and name == "output.weight"):
                found.setdefault(name, []).append((checkpoint, source))
    return {k: tuple(sorted(v, key=lambda s: gguf_names.expert(s[1]) or 0)) for k, v in found.items()}


def _shape(name: str, sources: Sources, config: Mapping[str, Any]) -> tuple[tuple[int, ...], str | None]:
    """Shape of a tensor, with an axis of experts first where it has one, and its type if it is packed."""
    (shape, kind), *others = (_one_shape(*s) for s in sources)
    if not name.endswith("_exps.weight"):
        return shape, kind
    c = gguf_names.text(config)
    count = int(c.get("num_local_experts") or c.get("num_experts") or 0)
    numbers = [gguf_names.expert(source) for _, source in sources]
    if numbers != list(range(count)) or any(o != (shape, kind) for o in others):
        raise RequestError(f"GGUF stores the {count} experts of {name} as one tensor of one type; these are not alike")
    return (count, *shape), kind


def _one_shape(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], str | None]:
    shape, leaf = checkpoint.shape(name), name.rpartition(".")[2]
    if not leaf.startswith(PACKED):
        return shape, None
    kind = leaf.removeprefix(PACKED)
    t = BLOCK_TYPES[kind]
    return (shape[0], shape[1] // t.size * t.shape.block), kind


def _parts(infos: Sequence[Info], most: int | None) -> list[list[Info]]:
    parts: list[list[Info]] = [[]]
    used = 0
    for info in infos:
        if most and parts[-1] and used + info.nbytes > most:
            parts.append([])
            used = 0
        parts[-1].append(info)
        used += info.nbytes
    return parts


def _rotary(config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    c = gguf_names.text(config)
    return c, gguf_names.head_size(c)


def keeps(dtype: torch.dtype, kind: str) -> bool:
    """Whether every value of ``dtype`` has the same value in the type ``kind``."""
    wider = {"f32": (torch.float32, torch.float16, torch.bfloat16)}
    return dtype in wider.get(kind, (gguf.DENSE[kind][1],) if kind in gguf.DENSE else ())
