"""From one format to another, weight by weight: exact where a twin of each weight has a place in the new format.

Two passes over the source, one module in memory at a time: the first finds what each weight becomes and refuses before
anything is written; the second writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits import formats, storage
from fewbits.errors import Refused, RequestError
from fewbits.formats import Entry, Layout, common, gguf_model, gguf_names
from fewbits.formats.carry import twins
from fewbits.formats.quantized import Reader, exact_dtype, open_reader
from fewbits.grids import Block, Grid, Int, Table, Vectorwise
from fewbits.solve import Nearest, Search, Solver
from fewbits.storage import Checkpoint
from fewbits.tensor import Quantized

DENSE = "transformers"
TARGETS = (*formats.LAYOUTS, DENSE)
PART = 256 << 20
_INPUTS = "inputs of layers are not quantized any more: the new format has no place for how they were"
_HEADS = ("fewbits", "gptq", "compressed-tensors", "gguf")
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
_FITS = (32, 16, 8, 4, 2, 1)


@dataclass
class Converted:
    """What became of the weights: ``exact`` ones by grid (twin's description: count), ``rounded`` ones with their
    relative error, and ``notes`` on what has no place in the new format.
    """

    out: str
    format: str
    size_bytes: int = 0
    exact: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        found = {"out": self.out, "format": self.format, "size_bytes": self.size_bytes}
        return found | {
            "exact": not self.rounded,
            "grids": self.exact,
            "rounded": self.rounded,
            "notes": self.notes,
        }


def convert(
    src: str | Path,
    out: Path,
    target: str,
    dtype: torch.dtype | None = None,
    lossy: bool = False,
    dry_run: bool = False,
) -> Converted:
    """Convert a quantized checkpoint (a directory, or a .gguf file) into ``target``, one of :data:`TARGETS`.

    ``dtype`` of dense weights: by default float32, in which every grid is exact. Raises RequestError when a weight has
    no place in the new format and ``lossy`` does not allow rounding it; nothing is written then, nor in a ``dry_run``.
    """
    if target not in TARGETS:
        raise RequestError(f"format {target!r} is unknown; allowed: {', '.join(TARGETS)}")
    reader = open_reader(src)
    if reader.name == target:
        raise RequestError(
            f"{src} is in format {target} already; allowed: {', '.join(t for t in TARGETS if t != target)}"
        )
    found = Converted(str(out), target)
    carry = _Carry(target, dtype or torch.float32, lossy)
    entries = [e for name, q in reader.modules() if (e := carry.settle(name, q, found)) is not None]
    carry.refuse(str(src))
    if dry_run:
        return found
    for name, t in _linear(reader.rest()):
        entries.append(Entry(name.removesuffix(".weight"), (t.shape[0], t.shape[1]), None))
    partial = out.with_name(out.name + ".converting")  # a file of that name and ".partial" is being written
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        paths = _write(reader, carry, _same(target, entries), partial, out)
        found.size_bytes = sum(p.stat().st_size for p in paths)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def _same(target: str, entries: list[Entry]) -> list[Entry]:
    """Entries as the format describes them: AWQ has one grid for all, and among affine ones symmetric ones are too."""
    if target != "awq" or all(getattr(e.grid, "symmetric", True) for e in entries):
        return entries
    return [replace(e, grid=replace(e.grid, symmetric=False)) if isinstance(e.grid, Int) else e for e in entries]


# ---- what each weight becomes ----------------------------------------------------------------------------------------


class _Carry:
    """Decides once what each weight becomes, and makes it so again when it is written."""

    def __init__(self, target: str, dtype: torch.dtype, lossy: bool):
        self.target, self.dtype, self.lossy = target, dtype, lossy
        self.layout: Layout | None = None if target == DENSE else formats.get(target)
        self.reasons: dict[str, list[str]] = {}
        self.choices: dict[str, int] = {}

    def settle(self, name: str, q: Quantized, found: Converted) -> Entry | None:
        """The entry of a weight in the new format; None when it becomes dense."""
        if q.inputs is not None and not self._takes_inputs(name, q) and _INPUTS not in found.notes:
            found.notes.append(_INPUTS)
        chosen = self._choose(name, q)
        if chosen is None:
            w = q.dense()
            if self.target == DENSE and not torch.equal(w.to(self.dtype).float(), w):
                self._loses(
                    name, f"{_short(self.dtype)} cannot hold its numbers, float32 can", w, w.to(self.dtype), found
                )
            else:
                _count(found.exact, "dense")
            return None
        form, exact = chosen
        if exact:
            _count(found.exact, common.describe(form.grid))
        else:
            scattered = " with groups of scattered columns (g_idx)" if "g_idx" in q.params else ""
            self._loses(
                name, f"nothing in it equals {common.describe(q.grid)}{scattered}", q.dense(), form.dense(), found
            )
        activations = None if form.inputs is None else form.inputs.scheme
        return Entry(name, form.shape, form.grid, "g_idx" in form.params, activations=activations)

    def again(self, name: str, q: Quantized) -> Quantized | None:
        """What :meth:`settle` decided, made once more."""
        k = self.choices.get(name)
        return None if k is None else self._with_inputs(name, next(islice(self._forms(q), k, None))[0])

    def refuse(self, source: str) -> None:
        """Raise RequestError when something would be lost and that was not allowed."""
        if self.reasons and not self.lossy:
            why = "; ".join(f"{r} ({_some(n)})" for r, n in self.reasons.items())
            raise RequestError(
                f"{source} cannot become {self.target} exactly: {why}; --lossy rounds these weights, "
                "or choose another format"
            )

    def _forms(self, q: Quantized) -> Iterator[tuple[Quantized, bool]]:
        """Twins (exact), then the nearest in the new format."""
        yield from ((twin, True) for twin in twins(q))
        grid = _nearest_grid(self.target, q)
        solver: Solver = Search() if isinstance(grid, Block) else Nearest()
        yield solver(q.dense(), grid, None), False

    def _choose(self, name: str, q: Quantized) -> tuple[Quantized, bool] | None:
        """The first form that the layout stores; None for what becomes dense."""
        last = name.rpartition(".")[2]
        stays = last == "embed_tokens" or (last == "lm_head" and self.target not in _HEADS)
        if self.layout is None or stays:
            return None
        for k, (form, exact) in enumerate(self._forms(q)):
            form = self._with_inputs(name, form)
            if not self.layout.check([Entry(name, form.shape, form.grid, "g_idx" in form.params, _residual(form))]):
                self.choices[name] = k
                return form, exact
        raise Refused(self.target, {f"no grid of it holds {common.describe(q.grid)}, not even nearly": [name]})

    def _takes_inputs(self, name: str, q: Quantized) -> bool:
        takes = getattr(self.layout, "activations", None)
        if takes is None or q.inputs is None:
            return False
        return takes(Entry(name, q.shape, q.grid, activations=q.inputs.scheme)) is None

    def _with_inputs(self, name: str, q: Quantized) -> Quantized:
        return q if q.inputs is None or self._takes_inputs(name, q) else replace(q, inputs=None)

    def _loses(self, name: str, why: str, w: Tensor, now: Tensor, found: Converted) -> None:
        self.reasons.setdefault(why, []).append(name)
        found.rounded[name] = float((now.float() - w).norm() / w.norm().clamp(min=1e-30))


def _nearest_grid(target: str, q: Quantized) -> Grid:
    """Where a weight is rounded to when nothing of the format is like it: 4 bits, or 8 from 5 bits on."""
    columns = q.shape[1]
    many = (getattr(q.grid, "levels", 16) - 1).bit_length() > 4
    group = next(g for g in _FITS if columns % g == 0)
    if target == "bitsandbytes":
        return Vectorwise() if many else Table("nf4", 64)
    if target == "gguf":
        return Block("q8_0" if many else "q4_0")
    return Int(8 if many and target != "awq" else 4, group if group > 8 else -1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _residual(q: Quantized) -> str | None:
    return None if q.residual is None else type(q.residual).__name__


def _count(table: dict[str, int], key: str) -> None:
    table[key] = table.get(key, 0) + 1


def _some(names: Sequence[str], most: int = 2) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write(reader: Reader, carry: _Carry, entries: list[Entry], folder: Path, out: Path) -> list[Path]:
    layout = None if carry.target == DENSE else formats.writer(carry.target, entries, _dtype(reader, carry))
    config = dict(reader.config)
    parts = _Parts(folder)
    for name, t in reader.rest():
        parts.add({name: t.contiguous()})
    for name, q in reader.modules():
        new = carry.again(name, q)
        if new is None or layout is None:
            dtype = carry.dtype if carry.target == DENSE else exact_dtype(q.dense())
            parts.add({f"{name}.weight": q.dense().to(dtype)})
        else:
            parts.add(layout.pack(name, new))
    parts.flush()
    reader.side_files(folder)
    config["dtype"] = _dtype(reader, carry)
    if layout is not None and carry.target != "gguf":
        config["quantization_config"] = layout.config(entries)
        for name, text in layout.files(entries).items():
            (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return _gguf(parts.paths, folder, out) if carry.target == "gguf" else _directory(parts.paths, folder, out)


def _dtype(reader: Reader, carry: _Carry) -> str:
    """The dtype that config.json states."""
    if carry.target == DENSE:
        return _short(carry.dtype)
    stated = reader.config.get("dtype") or reader.config.get("torch_dtype")
    return stated if stated in ("float16", "bfloat16", "float32") else "float16"


def _gguf(parts: Sequence[Path], folder: Path, out: Path) -> list[Path]:
    """Dense matrices keep their dtype; everything else is llama.cpp's affair."""
    checkpoints = [Checkpoint.open(p) for p in parts]
    family = gguf_names.family(str(gguf_names.text(gguf_model.read_config(folder)).get("model_type")))
    kinds = {}
    for checkpoint in checkpoints:
        for name in checkpoint.names():
            stored = gguf_names.stored_name(name, family) if not name.rpartition(".")[2].startswith("ggml_") else None
            if stored is not None and len(checkpoint.shape(name)) == 2 and checkpoint.dtype(name) in _KINDS:
                kinds[stored] = _KINDS[checkpoint.dtype(name)]
    export = gguf_model.prepare(folder, checkpoints, "f16", kinds=kinds, title=out.stem)
    return export.write(out)


def _directory(parts: Sequence[Path], folder: Path, out: Path) -> list[Path]:
    storage.merge(parts, folder)
    for p in parts:
        p.unlink()
    if out.exists():
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    folder.rename(out)
    return sorted(p for p in out.iterdir() if p.is_file())


class _Parts:
    """Tensors gathered into files of a bounded size."""

    def __init__(self, folder: Path):
        self.folder, self.paths = folder, list[Path]()
        self.held: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self.held |= tensors
        if sum(t.nbytes for t in self.held.values()) > PART:
            self.flush()

    def flush(self) -> None:
        if self.held:
            path = self.folder / f"part-{len(self.paths):05}.tmp.safetensors"
            storage.save(path, self.held)
            self.paths.append(path)
            self.held = {}


def _linear(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Dense matrices inside the blocks."""
    for name, t in tensors:
        if t.ndim == 2 and name.endswith(".weight") and any(part.isdigit() for part in name.split(".")):
            yield name, t
