"""Every tensor that a run will write, before it: name, component and bytes, from shapes alone.

The layout itself says what it writes: it packs a blank, a weight whose tensors are on the meta device and hold nothing.
So no rule of any format stands here twice, and a new one is planned without a line of its own.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.activations import Activations, Inputs
from fewbits.formats import gguf_blocks, gguf_mixtures, gguf_model, gguf_names, gguf_rope
from fewbits.formats.fewbits import KINDS
from fewbits.formats.gguf import Info
from fewbits.grids import BLOCK_TYPES, Block
from fewbits.model import get_weight
from fewbits.pipeline.job import Job
from fewbits.pipeline.walk import DTYPES
from fewbits.plan import Recipe
from fewbits.tensor import Quantized

COMPONENTS = ("weights", "scales", "zeros", "codebooks", "indices", "dense", "embeddings", "head", "norms", "other")
"""``weights`` are codes, ``indices`` what says where they belong (g_idx, shapes, states), ``dense`` linear weights in
the blocks that stay off the grid, ``norms`` vectors (biases too)."""

# The component of a quantized module's tensor, by the last part of its name.
_PARTS = {
    "weights": "qweight weight_packed codes filled weight",
    "scales": "scales weight_scale scale absmax weight.absmax SCB nested weight.nested_absmax offset global "
    "weight_global_scale input_scale",
    "zeros": "qzeros weight_zero_point zero",
    "codebooks": "weight.quant_map weight.nested_quant_map codebook codebooks table lut",
}
_COMPONENT = {suffix: part for part, suffixes in _PARTS.items() for suffix in suffixes.split()}


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: ``expert`` says that it belongs to one of several routed experts."""

    name: str
    component: str
    nbytes: int
    expert: bool = False


def stored(job: Job) -> list[Stored]:
    """Every tensor of the output, exact to the byte. Text in tensors (bitsandbytes' states) may differ by the digits
    of a number.
    """
    pieces, count = [*_blocks(job), *_outside(job)], _Counter(job)
    return count.gguf(pieces) if job.layout.name == "gguf" else [count(p) for p in pieces]


# ---- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """A tensor that is written as it is (``module`` None), or one of a quantized module's, on the meta device."""

    name: str
    tensor: Tensor
    module: str | None = None


def _blocks(job: Job) -> Iterable[_Piece]:
    source, blanks = job.source, _Blanks(job)
    scattered = {e.name for e in job.entries if e.scattered}
    for i in range(source.n_blocks):
        block = source.skeleton(i)
        names = {local: source.disk_name(i, local) for local in source.linears(block)}
        on_grid = {local: r for local, name in names.items() if (r := job.recipes[name]) is not None}
        for name, t in source.state(block, i, without=on_grid, dtype=DTYPES[job.plan.dtype]).items():
            yield _Piece(name, t)
        for local, recipe in on_grid.items():
            out, columns = _matrix(block, local)
            yield from blanks.pack(names[local], recipe, (out, columns), names[local] in scattered)


def _outside(job: Job) -> Iterable[_Piece]:
    source, blanks, head = job.source, _Blanks(job), job.source.head_name
    if (recipe := job.recipes.get(head)) is not None:
        yield from blanks.pack(head, recipe, source.head_shape, getattr(recipe.solver, "scatters", False))
    for name in source.outside():
        module, shape = name.removesuffix(".weight"), source.checkpoint.shape(name)
        if recipe is not None and module == head:
            continue
        rule = next((r for r in job.plan.outside if fnmatch.fnmatchcase(module, r.match)), None)
        if rule is not None and rule.recipe is not None:
            yield from blanks.pack(module, rule.recipe, (shape[0], shape[1]), False)
        else:
            dtype = source.checkpoint.dtype(name)
            kept = DTYPES[job.plan.dtype] if dtype.is_floating_point else dtype
            yield _Piece(name, torch.empty(shape, dtype=kept, device="meta"))


def _matrix(block: torch.nn.Module, local: str) -> tuple[int, int]:
    out, columns = get_weight(block.get_submodule(local)).shape
    return int(out), int(columns)


class _Blanks:
    """Packs blanks, each kind once."""

    def __init__(self, job: Job):
        self.layout, self._known = job.layout, dict[tuple[Any, ...], dict[str, Tensor]]()

    def pack(self, name: str, recipe: Recipe, shape: tuple[int, int], scattered: bool) -> Iterable[_Piece]:
        key = (recipe.grid, recipe.activations, shape, scattered)
        if key not in self._known:
            packed = self.layout.pack(name, blank(recipe.grid, shape, scattered, recipe.activations))
            self._known[key] = {k.removeprefix(f"{name}."): t for k, t in packed.items()}
        return [_Piece(f"{name}.{suffix}", t, name) for suffix, t in self._known[key].items()]


def blank(grid: Any, shape: tuple[int, int], scattered: bool = False, scheme: Activations | None = None) -> Quantized:
    """A quantized weight ``shape`` without numbers: tensors of more than one value are on the meta device."""
    if isinstance(grid, Block):
        params = _block_params(grid, shape)
    else:
        specs = KINDS[type(grid).__name__].params(grid, shape)
        wanted = {k: s for k, s in specs.items() if not s.optional or (k == "g_idx" and scattered)}
        params = {k: _empty(s.shape, s.dtype) for k, s in wanted.items()}
    inputs = None
    if scheme is not None:
        inputs = Inputs(scheme) if scheme.dynamic else Inputs(scheme, torch.ones(1))
    codes = torch.empty(shape[0], shape[1] // grid.width, dtype=torch.uint8, device="meta")
    return Quantized(grid, codes, params, inputs=inputs)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    one = all(n == 1 for n in shape)
    return torch.full(shape, 0.0123456789).to(dtype) if one else torch.empty(shape, dtype=dtype, device="meta")


def _block_params(grid: Block, shape: tuple[int, int]) -> dict[str, Tensor]:
    t = grid.type.shape
    blocks = (shape[0], shape[1] // t.block)
    found = {"d": torch.empty(blocks, dtype=torch.uint8 if grid.name == "mxfp4" else torch.float16, device="meta")}
    if t.m:
        found["m"] = torch.empty(blocks, dtype=torch.float16, device="meta")
    for name in ("scales", "mins")[: (t.sub > 0) + t.mins]:
        found[name] = torch.empty(shape[0], shape[1] // t.sub, dtype=torch.int8, device="meta")
    return found


# ---- how it counts ---------------------------------------------------------------------------------------------------


class _Counter:
    """Turns pieces into what is stored."""

    def __init__(self, job: Job):
        self.source, self.outside = job.source, frozenset(job.source.outside())

    def __call__(self, p: _Piece) -> Stored:
        if p.module is None:
            component = self.dense(p.name, tuple(p.tensor.shape))
        else:
            component = _COMPONENT.get(p.name.removeprefix(f"{p.module}."), "indices")
        return Stored(p.name, component, p.tensor.nbytes, ".experts." in p.name)

    def dense(self, name: str, shape: tuple[int, ...]) -> str:
        """The component of a tensor that stays off the grid."""
        if len(shape) < 2:
            return "norms"
        if name not in self.outside:
            return "dense"
        if name.removesuffix(".weight") == self.source.head_name:
            return "embeddings" if self.source.tied else "head"
        return "embeddings" if shape[0] == self.source.head_shape[0] else "other"

    def gguf(self, pieces: Iterable[_Piece]) -> list[Stored]:
        """The tensors of the one file: some are left out, the dense ones get the types of mixture "f16"."""
        config = self.source.raw_config
        family = gguf_names.family(self.source.text_config.model_type)
        facts, mix = gguf_model.facts_of(config, self.source.tied, False), gguf_mixtures.mixture("f16")
        found = []
        for p in pieces:
            module, shape = gguf_model.module_name(p.name), tuple(p.tensor.shape)
            name = gguf_names.stored_name(module, family)
            if name is None or (self.source.tied and name == "output.weight"):
                continue
            if p.module is None:
                kind = gguf_mixtures.kind_of(mix, name, shape, facts)
                found.append(Stored(name, self.dense(p.name, shape), Info(name, kind, shape).nbytes))
            elif module in self.outside:
                found.append(Stored(name, "embeddings" if name == "token_embd.weight" else "head", p.tensor.nbytes))
            else:
                found += _split(name, p)
        text = gguf_names.text(config)
        factors = gguf_rope.tensors(text, gguf_names.head_size(text))
        return found + [Stored(name, "other", t.nbytes) for name, t in factors.items()]


def _split(name: str, p: _Piece) -> list[Stored]:
    """A packed weight as its codes and its scales, which lie between each other in one tensor."""
    kind = p.name.rpartition(".")[2].removeprefix(gguf_model.PACKED)
    fields = gguf_blocks.FORMATS[kind].fields
    codes = sum(f.size for f in fields if isinstance(f, gguf_blocks.Trits) or getattr(f, "name", "") == "codes")
    share = p.tensor.nbytes * codes // BLOCK_TYPES[kind].size
    return [Stored(name, "weights", share), Stored(name, "scales", p.tensor.nbytes - share)]


def by_component(tensors: Iterable[Stored]) -> dict[str, int]:
    """Bytes of each component, those that there are."""
    found = dict.fromkeys(COMPONENTS, 0)
    for t in tensors:
        found[t.component] += t.nbytes
    return {k: n for k, n in found.items() if n}


def total(components: Mapping[str, int]) -> int:
    """Bytes of all."""
    return sum(components.values())
