"""A model as its headers: what planning needs, from a directory that may hold a config.json and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.model import Source, locate

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Imagined:
    """Stands for the checkpoint of a model that is not here: names and shapes of its tensors, all of one dtype."""

    files: tuple[Path, ...] = ()

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype):
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._dtype = dtype

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def nbytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    @property
    def size_bytes(self) -> int:
        return sum(self.nbytes(name) for name in self._shapes)

    def tensor(self, name: str) -> Tensor:
        raise RequestError(f"tensor {name} is not here: this is the plan of a model that has a config.json only")

    def release(self) -> None:
        pass


def open_headers(source: str | Path) -> Source:
    """The model of a transformers directory or hub id, weights left alone; where there are none, transformers' own
    model of that config.json says what they would be. Raises what :meth:`Source.open` raises.
    """
    path = locate.directory(source)
    if any(path.glob("*.safetensors")) or not (path / "config.json").is_file():
        return Source.open(source)
    return imagine(path, locate.read_config(path))


def imagine(path: Path, raw: dict[str, Any]) -> Source:
    """The model that ``raw``, a config.json, describes. Raises RequestError when it is no causal language model."""
    config = locate.config(path, raw, trust_remote_code=False)
    model = locate.skeleton(config)
    tied = set(model.all_tied_weights_keys)  # type: ignore[arg-type]
    shapes = {name: t.shape for name, t in model.state_dict().items() if name not in tied}
    dtype = _DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16)
    return Source(path, config, raw, cast(Any, Imagined(shapes, dtype)))
