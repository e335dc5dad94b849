"""What a checkpoint holds: which modules are quantized, on which grid, bits per weight, size."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import CheckpointError
from fewbits.formats.common import describe
from fewbits.storage import Checkpoint

# Two-dimensional weights that are looked up or tied to a lookup: not linear layers of the decoder.
_NOT_LINEAR = ("embed", "wte", "wpe", "lm_head")


@dataclass(frozen=True)
class ModuleBits:
    """One linear weight ``(out, in)``: its grid (a dense one's dtype) and bits per weight, every parameter counted."""

    name: str
    shape: tuple[int, ...]
    grid: str
    bits_per_weight: float
    size_bytes: int

    @property
    def parameters(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class Census:
    """What is in a checkpoint.

    ``format`` is ``dense`` or a layout's name. ``dtypes`` maps a stored dtype to (tensors, bytes).
    ``bits_per_weight`` is over the quantized modules, or over the linear weights of a dense model; None when there is
    no linear weight. ``size_bytes`` is all files of the directory. ``parameters`` counts weights, not stored words.
    """

    path: str
    format: str
    architecture: str | None
    modules: tuple[ModuleBits, ...]
    dtypes: dict[str, tuple[int, int]]
    parameters: int
    size_bytes: int
    bits_per_weight: float | None

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["dtypes"] = {k: {"tensors": n, "bytes": size} for k, (n, size) in self.dtypes.items()}
        return found


def census(path: str | Path, check: bool = False) -> Census:
    """Count what is in a checkpoint directory or a ``.safetensors`` file, without building the model.

    ``check`` reads every tensor: all quantized modules are unpacked and all floating-point tensors must be finite.
    Without it one module of each shape is unpacked. Raises RequestError when there is nothing to read,
    CheckpointError when it is damaged.
    """
    from fewbits.runtime.loading import gguf_file

    if (file := gguf_file(path)) is not None:
        return _gguf(file, Path(path), check)
    checkpoint = Checkpoint.open(path)
    config = _config(Path(path))
    quantization = config.get("quantization_config")
    if check:
        _finite(checkpoint)
    if quantization:
        kind, modules = _quantized(checkpoint, quantization, check)
        suffixed = {m.name for m in modules}
    else:
        kind, modules, suffixed = "dense", _dense(checkpoint), set()
    others = sum(
        _numel(checkpoint, n) for n in checkpoint.names() if n.rpartition(".")[0] not in suffixed or n.endswith(".bias")
    )
    weights = sum(m.parameters for m in modules)
    found = Census(
        path=str(path),
        format=kind,
        architecture=next(iter(config.get("architectures") or []), None),
        modules=tuple(modules),
        dtypes=_dtypes(checkpoint),
        parameters=others + weights if quantization else others,
        size_bytes=_size(Path(path)),
        bits_per_weight=sum(m.bits_per_weight * m.parameters for m in modules) / weights if weights else None,
    )
    checkpoint.release()
    return found


def _gguf(file: Path, path: Path, check: bool) -> Census:
    from fewbits.formats import gguf

    opened = gguf.read(file)
    modules, parameters = [], 0
    dtypes: dict[str, tuple[int, int]] = {}
    for info in opened.infos.values():
        count = math.prod(info.shape)
        parameters += count
        tensors, size = dtypes.get(info.kind, (0, 0))
        dtypes[info.kind] = (tensors + 1, size + info.nbytes)
        if info.name.startswith("blk.") and len(info.shape) == 2:
            name = info.name.removesuffix(".weight")
            modules.append(ModuleBits(name, info.shape, info.kind, 8 * info.nbytes / count, info.nbytes))
        if check:
            values = opened.tensor(info.name)
            if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
                raise CheckpointError(f"tensor {info.name!r} holds values that are not finite; the model is damaged")
            opened.release()
    weights = sum(m.parameters for m in modules)
    return Census(
        path=str(path),
        format="gguf",
        architecture=str(opened.metadata.get("general.architecture", "unknown")),
        modules=tuple(modules),
        dtypes=dtypes,
        parameters=parameters,
        size_bytes=_size(path) if path.is_dir() else sum(p.stat().st_size for p in opened.paths),
        bits_per_weight=sum(m.bits_per_weight * m.parameters for m in modules) / weights if weights else None,
    )


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size


def _config(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{file} is not readable JSON ({e}); restore it from the original model") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object; restore it from the original model")
    return found


def _quantized(checkpoint: Checkpoint, quantization: dict[str, Any], check: bool) -> tuple[str, list[ModuleBits]]:
    from fewbits import formats

    layout = formats.detect(quantization)
    parts = formats.modules(checkpoint.names(), layout)
    known: dict[tuple[Any, ...], tuple[tuple[int, int], str, float]] = {}
    modules = []
    for module, suffixes in parts.items():
        names = [f"{module}.{s}" for s in suffixes]
        key = tuple((s, checkpoint.shape(n), checkpoint.dtype(n)) for s, n in zip(suffixes, names, strict=True))
        if check or key not in known:
            q = layout.unpack(module, {s: checkpoint.tensor(n) for s, n in zip(suffixes, names, strict=True)})
            known[key] = (q.shape, describe(q.grid), q.bits_per_weight())
            checkpoint.release()
        modules.append(ModuleBits(module, *known[key], sum(checkpoint.nbytes(n) for n in names)))
    return layout.name, modules


def _dense(checkpoint: Checkpoint) -> list[ModuleBits]:
    found = []
    for name in checkpoint.names():
        module, _, suffix = name.rpartition(".")
        shape = checkpoint.shape(name)
        if suffix != "weight" or len(shape) != 2 or any(part in name for part in _NOT_LINEAR):
            continue
        dtype = checkpoint.dtype(name)
        found.append(ModuleBits(module, shape, _short(dtype), 8.0 * dtype.itemsize, checkpoint.nbytes(name)))
    return found


def _dtypes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name in checkpoint.names():
        dtype = _short(checkpoint.dtype(name))
        tensors, size = found.get(dtype, (0, 0))
        found[dtype] = (tensors + 1, size + checkpoint.nbytes(name))
    return found


def _finite(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"tensor {name!r} holds values that are not finite; the model is damaged")
        checkpoint.release()


def _numel(checkpoint: Checkpoint, name: str) -> int:
    count = 1
    for n in checkpoint.shape(name):
        count *= n
    return count


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
