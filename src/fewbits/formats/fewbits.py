"""Our own layout, schema version 1: the only one that holds everything that a grid can be.

Tensors: ``<module>.codes`` and one per parameter (``<module>.scale``, ``<module>.zero``, ``<module>.g_idx``). Codes are
int32 words, one continuous bitstream per row, least significant first: ``[out, ceil(in/width*b/32)]``. Parameters of
``b`` bits are one bitstream over all their values, row by row; others lie as they are.

``quantization_config``: ``{"quant_method": "fewbits", "fewbits_version": 1, "groups": [{"grid": {"type": "Int", ...},
"modules": {name: [out, in]}}]}``; a group whose layers quantize their inputs has ``"activations"`` too, and its
modules ``<module>.input_scale`` float32 ``[1]`` when that scale is static. Shapes
stand there, so that a model can be built before a tensor is read. Single weights beside the codes are two more tensors
(``sparse.py``); two stand in place of the codes where pruning left few of them (``pruned.py``).

A new grid is one more :class:`Kind` in ``KINDS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.activations import Activations
from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import bitpack, common, inputs, pruned, sparse
from fewbits.formats.base import Entry, Refusal
from fewbits.grids import Bilevel, Float, Grid, Int, Int16, Learned, Table, Vectorwise, groups_of
from fewbits.grids.double import BLOCK
from fewbits.tensor import Quantized, Sparse

VERSION = 1


@dataclass(frozen=True)
class Spec:
    """How one tensor is stored: its ``shape``, its ``dtype`` in memory, and ``bits`` per value if it is packed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int | None = None
    optional: bool = False


@dataclass(frozen=True)
class Kind:
    """How grids of one class are stored: ``fields`` that describe one, and its tensors for a weight ``(out, in)``."""

    grid: type[Any]
    fields: tuple[str, ...]
    code_bits: Callable[[Any], int]
    params: Callable[[Any, tuple[int, int]], dict[str, Spec]]
    reasons: Callable[[Any, tuple[int, int]], Iterator[str]]


def _int_params(g: Int, shape: tuple[int, int]) -> dict[str, Spec]:
    shared = (1 if g.rows == -1 else shape[0] // g.rows, groups_of(shape[1], g.group))
    found = {"scale": Spec(shared, g.dtype), "g_idx": Spec((shape[1],), torch.int32, optional=True)}
    return found if g.symmetric else found | {"zero": Spec(shared, torch.uint8, g.bits)}


def _int_reasons(g: Int, shape: tuple[int, int]) -> Iterator[str]:
    if g.rows != -1 and shape[0] % g.rows:
        yield f"rows must be a multiple of the {g.rows} that share a scale"


def _float_params(g: Float, shape: tuple[int, int]) -> dict[str, Spec]:
    found = {"scale": Spec(g.tiles(shape), g.dtype), "g_idx": Spec((shape[1],), torch.int32, optional=True)}
    return found | ({"global": Spec((1,), torch.float32)} if g.scale == "e4m3" else {})


def _table_params(g: Table, shape: tuple[int, int]) -> dict[str, Spec]:
    blocks = g.blocks(shape)
    found = {"g_idx": Spec((shape[1],), torch.int32, optional=True)}
    if not g.nested:
        return found | {"absmax": Spec(blocks, torch.float32)}
    nested = (groups_of(math.prod(blocks), BLOCK),)
    found |= {"absmax": Spec(blocks, torch.uint8), "nested": Spec(nested, torch.float32)}
    return found | {"offset": Spec((1,), torch.float32)}


def _vectorwise_params(g: Vectorwise, shape: tuple[int, int]) -> dict[str, Spec]:
    return {"absmax": Spec((shape[0], 1), torch.float32)}


def _int16_params(g: Int16, shape: tuple[int, int]) -> dict[str, Spec]:
    found = {"scale": Spec((shape[0], groups_of(shape[1], g.group)), torch.float32)}
    return found | {"g_idx": Spec((shape[1],), torch.int32, optional=True)}


def _bilevel_params(g: Bilevel, shape: tuple[int, int]) -> dict[str, Spec]:
    groups = groups_of(shape[1], g.group)
    found = {"g_idx": Spec((shape[1],), torch.int32, optional=True)}
    if g.nested == 0:
        return found | {key: Spec((shape[0], groups), torch.float32) for key in ("scale", "zero")}
    for key in ("scale", "zero"):
        found[f"{key}_code"] = Spec((shape[0], groups), torch.uint8, g.nested)
        shared = Spec((-(-shape[0] // g.rows), groups), torch.float16)
        found |= {f"{key}_base": shared, f"{key}_step": shared}
    return found


def _learned_params(g: Learned, shape: tuple[int, int]) -> dict[str, Spec]:
    return {"table": Spec((shape[0], g.levels), torch.float16)}


def _no_reasons(g: Grid, shape: tuple[int, int]) -> Iterator[str]:
    yield from ()


KINDS: dict[str, Kind] = {
    "Int": Kind(
        Int, ("bits", "group", "rows", "symmetric", "scale", "narrow"), lambda g: g.bits, _int_params, _int_reasons
    ),
    "Float": Kind(
        Float, ("element", "group", "rows", "scale"), lambda g: g.bits, _float_params, lambda g, shape: iter(())
    ),
    "Table": Kind(Table, ("codebook", "group", "nested"), lambda g: g.bits, _table_params, _no_reasons),
    "Int16": Kind(Int16, ("group",), lambda g: g.bits, _int16_params, _no_reasons),
    "Bilevel": Kind(Bilevel, ("bits", "group", "nested", "rows"), lambda g: g.bits, _bilevel_params, _no_reasons),
    "Learned": Kind(Learned, ("bits",), lambda g: g.bits, _learned_params, _no_reasons),
    "Vectorwise": Kind(Vectorwise, (), lambda g: g.bits, _vectorwise_params, _no_reasons),
}


@dataclass(frozen=True)
class Fewbits:
    """``modules``: name, grid and shape ``(out, in)`` of each; empty for an instance that only packs. ``schemes``: name
    and scheme of those whose inputs are quantized.
    """

    modules: tuple[tuple[str, Any, tuple[int, int]], ...] = ()
    schemes: tuple[tuple[str, Activations], ...] = ()

    name: ClassVar[str] = "fewbits"
    scale_dtype: ClassVar[str | None] = "float16"
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"codes", "scale", "zero", "g_idx", "global", "absmax", "nested", "offset", "input_scale", "table"}
        | {f"{key}_{part}" for key in ("scale", "zero") for part in ("code", "base", "step")}
        | sparse.SUFFIXES
        | pruned.SUFFIXES
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {name: (grid, shape) for name, grid, shape in self.modules})
        object.__setattr__(self, "_inputs", dict(self.schemes))

    def check(self, entries: Sequence[Entry]) -> list[Refusal]:
        return [Refusal(e.name, reason) for e in entries if e.grid is not None for reason in _reasons(e)]

    def activations(self, e: Entry) -> str | None:
        """Nothing that it cannot describe."""
        return None

    def pack(self, name: str, q: Quantized) -> dict[str, Tensor]:
        """See the file's head. Raises RequestError for grids not in ``KINDS`` and for parameters that do not fit."""
        if reasons := list(
            _reasons(Entry(name, q.shape, q.grid, residual=type(q.residual).__name__ if q.residual else None))
        ):
            raise RequestError(f"{name}: format fewbits cannot store it: {reasons[0]}")
        kind = KINDS[type(q.grid).__name__]
        bits = kind.code_bits(q.grid)
        found = pruned.pack(name, q.codes, q.zeros(), bits) if q.pruned else None
        found = found or {f"{name}.codes": bitpack.pack(q.codes, bits)}
        specs = kind.params(q.grid, q.shape)
        for key, spec in specs.items():
            if key not in q.params and spec.optional:
                continue
            if key not in q.params or tuple(q.params[key].shape) != spec.shape or q.params[key].dtype != spec.dtype:
                raise RequestError(
                    f"{name}: parameter {key!r} does not fit the grid; expected {spec.dtype} {spec.shape}"
                )
            p = q.params[key]
            found[f"{name}.{key}"] = p.contiguous() if spec.bits is None else bitpack.pack(p.reshape(-1), spec.bits)
        if extra := set(q.params) - set(specs):
            raise RequestError(f"{name}: format fewbits does not know the parameters {', '.join(sorted(extra))}")
        kept = sparse.pack(name, q.residual if isinstance(q.residual, Sparse) else None)
        return found | kept | inputs.scale_of(name, q.inputs)

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> Quantized:
        grid, shape = self.find(name)
        kind = KINDS[type(grid).__name__]
        bits, count = kind.code_bits(grid), shape[1] // grid.width
        params: dict[str, Tensor] = {}
        for key, spec in kind.params(grid, shape).items():
            if key in tensors or not spec.optional:
                params[key] = _load(name, tensors, key, spec)
        if "g_idx" in params:
            params |= {"g_idx": _checked(name, params["g_idx"], groups_of(shape[1], grid.period))}
        taken = inputs.input_scale(name, tensors, self._inputs.get(name))  # type: ignore[attr-defined]
        kept, few = sparse.unpack(name, tensors, shape), bool(pruned.SUFFIXES.intersection(tensors))
        if few:
            codes = pruned.unpack(name, tensors, shape, bits, grid, params)
        else:
            packed = common.tensor(name, tensors, "codes", (torch.int32,), (shape[0], bitpack.words(count, bits)))
            codes = bitpack.unpack(packed, bits, count)
        return Quantized(grid, codes, params, kept, inputs=taken, pruned=few)

    def find(self, name: str) -> tuple[Any, tuple[int, int]]:
        """Grid and shape of a module. Raises CheckpointError when the configuration does not have it."""
        try:
            return self._by_name[name]  # type: ignore[attr-defined]
        except KeyError:
            raise CheckpointError(f"{name} is packed, but quantization_config does not list it") from None

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        groups: dict[str, dict[str, Any]] = {}
        for e in entries:
            if e.grid is not None:
                described: dict[str, Any] = {"grid": _describe(e.grid)}
                if e.activations is not None:
                    described["activations"] = inputs.describe(e.activations)
                group = groups.setdefault(repr(described), described | {"modules": {}})
                group["modules"][e.name] = list(e.shape)
        found = {"quant_method": "fewbits", "fewbits_version": VERSION, "writer": common.writer()}
        return found | {"groups": list(groups.values())}

    def files(self, entries: Sequence[Entry]) -> dict[str, str]:
        return {}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Fewbits:
        version = config.get("fewbits_version")
        if version != VERSION:
            raise CheckpointError(
                f"this checkpoint has fewbits_version {str(version)[:20]}; this release reads {VERSION}"
            )
        groups = config.get("groups")
        if not isinstance(groups, list):
            raise CheckpointError("quantization_config has no list of groups; the configuration is damaged")
        modules = tuple(module for group in groups for module in _modules(group))
        return cls(modules, tuple(scheme for group in groups for scheme in _schemes(group)))


def _reasons(e: Entry) -> Iterator[str]:
    if e.residual not in (None, Sparse.__name__):
        yield f"version {VERSION} of it has no place for a {e.residual} part beside the codes"
    kind = KINDS.get(type(e.grid).__name__)
    if kind is None:
        yield f"it does not know the grid {type(e.grid).__name__}; known: {', '.join(KINDS)}"
    else:
        yield from kind.reasons(e.grid, e.shape)


def _describe(grid: Grid) -> dict[str, Any]:
    name = type(grid).__name__
    return {"type": name} | {f: getattr(grid, f) for f in KINDS[name].fields}


def _modules(group: Any) -> Iterator[tuple[str, Any, tuple[int, int]]]:
    if not isinstance(group, Mapping) or not isinstance(group.get("modules"), Mapping):
        raise CheckpointError("quantization_config has a group without modules; the configuration is damaged")
    grid = _grid(group.get("grid"))
    for name, shape in group["modules"].items():
        natural = isinstance(shape, list) and len(shape) == 2 and all(type(v) is int and 0 < v < 2**31 for v in shape)
        if not natural or any(KINDS[type(grid).__name__].reasons(grid, tuple(shape))):
            raise CheckpointError(
                f"quantization_config gives {str(name)[:200]} the shape {str(shape)[:80]}, which cannot be"
            )
        yield name, grid, (shape[0], shape[1])


def _schemes(group: Mapping[str, Any]) -> Iterator[tuple[str, Activations]]:
    if "activations" in group:
        scheme = inputs.parse(group["activations"])
        yield from ((name, scheme) for name in group["modules"])


def _grid(described: Any) -> Any:
    kind = (
        KINDS.get(described["type"])
        if isinstance(described, Mapping) and isinstance(described.get("type"), str)
        else None
    )
    if kind is None:
        raise CheckpointError(f"quantization_config has the grid {str(described)[:80]}; known: {', '.join(KINDS)}")
    values = {f: described[f] for f in kind.fields if f in described}
    defaults = {f.name: f.default for f in fields(kind.grid)}
    if set(described) - {"type"} - set(values):
        raise CheckpointError(f"quantization_config has a grid with unknown fields: {str(described)[:120]}")
    if any(type(v) is not type(defaults[f]) for f, v in values.items() if defaults[f] is not MISSING):
        raise CheckpointError(f"quantization_config has a grid with fields of the wrong type: {str(described)[:120]}")
    try:
        return kind.grid(**values)
    except (RequestError, TypeError) as e:
        raise CheckpointError(f"quantization_config has a grid that cannot be: {e}") from None


def _load(name: str, tensors: Mapping[str, Tensor], key: str, spec: Spec) -> Tensor:
    count = 1
    for n in spec.shape:
        count *= n
    if spec.bits is not None:
        packed = common.tensor(name, tensors, key, (torch.int32,), (bitpack.words(count, spec.bits),))
        return bitpack.unpack(packed, spec.bits, count).reshape(spec.shape)
    found = common.tensor(name, tensors, key, (spec.dtype,), spec.shape)
    if spec.dtype.is_floating_point:
        common.finite(name, key, found.float())
    return found


def _checked(name: str, g_idx: Tensor, groups: int) -> Tensor:
    common.scattered(name, g_idx, 1, groups)  # for its range check: what was stored as g_idx stays one
    return g_idx
