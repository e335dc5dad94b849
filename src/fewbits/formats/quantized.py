"""Quantized models to read from, weight by weight, in one form: directories of transformers in any layout, GGUF."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbits import formats
from fewbits.errors import RequestError
from fewbits.formats import gguf, gguf_blocks, gguf_import, gguf_model, gguf_names
from fewbits.grids import BLOCK_TYPES, Block
from fewbits.storage import Checkpoint
from fewbits.tensor import Quantized

SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_OWN = ("config.json", "quantize_config.json", "quant_config.json", "model.safetensors.index.json")


class Reader(Protocol):
    """A quantized model to read from: its config.json without quantization, and its tensors under transformers'
    names.
    """

    config: dict[str, Any]
    name: str

    def modules(self) -> Iterator[tuple[str, Quantized]]: ...

    def rest(self) -> Iterator[tuple[str, Tensor]]: ...

    def side_files(self, out: Path) -> None:
        """Write the tokenizer and the like into ``out``."""
        ...


def exact_dtype(w: Tensor) -> torch.dtype:
    """The narrowest dtype that holds every number of ``w`` float32."""
    return next((d for d in (torch.float16, torch.bfloat16) if torch.equal(w.to(d).float(), w)), torch.float32)


def open_reader(src: str | Path) -> Reader:
    """Raises RequestError for a model that is not quantized or cannot be read."""
    path = Path(src)
    if path.suffix == ".gguf":
        return _Gguf(path)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (files := sorted(path.glob("*.gguf"))):
        return _Gguf(files[0])
    return _Directory(path)


class _Directory:
    """A quantized transformers directory."""

    def __init__(self, path: Path):
        self.path, self.config = path, gguf_model.read_config(path)
        quantization = self.config.pop("quantization_config", None)
        if not quantization:
            raise RequestError(
                f"{path} is not quantized; use `fewbits quantize`, or convert it to gguf or transformers"
            )
        self.layout = formats.detect(quantization)
        self.name, self.checkpoint = self.layout.name, Checkpoint.open(path)
        self.parts = formats.modules(self.checkpoint.names(), self.layout)

    def modules(self) -> Iterator[tuple[str, Quantized]]:
        for module, suffixes in self.parts.items():
            tensors = {s: self.checkpoint.tensor(f"{module}.{s}") for s in suffixes if s != "bias"}
            yield module, self.layout.unpack(module, tensors)
            self.checkpoint.release()

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        packed = {f"{m}.{s}" for m, suffixes in self.parts.items() for s in suffixes}
        for name in self.checkpoint.names():
            if name not in packed:
                yield name, self.checkpoint.tensor(name)

    def side_files(self, out: Path) -> None:
        for pattern in SIDE_FILES:
            for p in self.path.glob(pattern):
                if p.is_file() and p.name not in _OWN and not p.name.startswith("fewbits_"):
                    shutil.copyfile(p, out / p.name)


class _Gguf:
    """A .gguf file: packed rows in the order of transformers' heads."""

    name = "gguf"

    def __init__(self, path: Path):
        self.file = gguf.read(path)
        self.config = gguf_import.config_of(self.file)
        self.family = gguf_names.FAMILIES[self.config["model_type"]]
        self.packed = [i.name for i in self.file.infos.values() if i.kind in BLOCK_TYPES]

    def modules(self) -> Iterator[tuple[str, Quantized]]:
        for name in self.packed:
            plain = gguf_import.plain_name(name, self.family)
            if plain is None or not plain.endswith(".weight"):
                continue
            info = self.file.infos[name]
            rows, grid = info.shape[-2], Block(info.kind)
            for i, raw in enumerate(self.file.raw(name).view(-1, rows, info.nbytes // math.prod(info.shape[:-1]))):
                one = plain if len(info.shape) < 3 else gguf_import.expert_name(plain, i)
                raw = raw if (order := self._order(name, rows)) is None else raw[order]
                yield one.removesuffix(".weight"), Quantized(grid, *gguf_blocks.unpack(grid, raw))
            self.file.release()

    def _order(self, name: str, rows: int) -> Tensor | None:
        role = name.split(".")[2] if name.startswith("blk.") else ""
        if not self.family.permute or role not in ("attn_q", "attn_k"):
            return None
        heads = self.config["num_attention_heads" if role == "attn_q" else "num_key_value_heads"]
        return torch.argsort(gguf_model.neighbours(rows, heads))

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.file.infos:
            plain = gguf_import.plain_name(name, self.family)
            if plain is not None and name not in self.packed:
                w = gguf_import.tensor(self.file, name, self.config, self.family)
                yield from gguf_import.spread(plain, w.to(exact_dtype(w)) if w.ndim > 1 else w).items()

    def side_files(self, out: Path) -> None:
        with suppress(RequestError):  # a tokenizer of an unknown kind: the weights are what was asked for
            gguf_import.write_tokenizer(self.file, out)
