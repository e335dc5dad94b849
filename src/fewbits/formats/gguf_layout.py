"""GGUF as a layout: while a run lasts, a weight is rows of block bytes; at the end all of them go into one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import common, gguf_blocks, gguf_model
from fewbits.formats.base import Entry, Refusal
from fewbits.grids import BLOCK_TYPES, Block
from fewbits.storage import Checkpoint
from fewbits.tensor import Quantized

FILE = "model.gguf"
SPLIT = 40_000_000_000  # bytes of tensors in one file


@dataclass(frozen=True)
class GGUF:
    """``<module>.ggml_<type>``: uint8 ``[out, bytes of a row]``."""

    name: ClassVar[str] = "gguf"
    scale_dtype: ClassVar[str | None] = "float16"
    suffixes: ClassVar[frozenset[str]] = frozenset(f"{gguf_model.PACKED}{kind}" for kind in BLOCK_TYPES)

    def check(self, entries: Sequence[Entry]) -> list[Refusal]:
        return [Refusal(e.name, reason) for e in entries if e.grid is not None for reason in _reasons(e)]

    def pack(self, name: str, q: Quantized) -> dict[str, Tensor]:
        if not isinstance(q.grid, Block) or q.residual is not None:
            raise RequestError(f"{name}: format gguf stores GGUF's own block types only; use a method such as q4_k_m")
        return {f"{name}.{gguf_model.PACKED}{q.grid.name}": gguf_blocks.pack(q.grid, q.codes, q.params)}

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> Quantized:
        found = [s for s in tensors if s in self.suffixes]
        if len(found) != 1:
            raise CheckpointError(f"{name} has {len(found)} tensors of block types; the checkpoint is damaged")
        grid = Block(found[0].removeprefix(gguf_model.PACKED))
        raw = common.tensor(name, tensors, found[0], (torch.uint8,), None)
        return Quantized(grid, *gguf_blocks.unpack(grid, raw))

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {"quant_method": "gguf", "file": FILE, "writer": common.writer()}

    def files(self, entries: Sequence[Entry]) -> dict[str, str]:
        return {}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GGUF:
        return cls()

    @staticmethod
    def assemble(parts: Sequence[Path], folder: Path) -> list[Path]:
        """Write the finished parts as a GGUF file into ``folder``, which has config.json and the tokenizer."""
        title = folder.parent.name.removesuffix(".partial")
        export = gguf_model.prepare(folder, [Checkpoint.open(p) for p in parts], title=title)
        return export.write(folder / FILE, SPLIT)


def _reasons(e: Entry) -> Iterator[str]:
    if e.residual is not None:
        yield f"it has no place for a {e.residual} part beside the codes; use format fewbits"
    if e.scattered:
        yield "its blocks are consecutive columns; use a solver with static groups or natural order"
    if not isinstance(e.grid, Block):
        yield (
            f"it stores GGUF's own block types only, not {type(e.grid).__name__}; use a method such as q4_k_m, "
            "or format fewbits"
        )
    elif e.shape[1] % e.grid.period:
        yield f"{e.grid.name} has blocks of {e.grid.period} columns, which do not divide {e.shape[1]}"
