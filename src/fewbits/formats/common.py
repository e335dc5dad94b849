"""What the layouts share: asking tensors and configurations for what they must hold, and saying what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewbits.errors import CheckpointError, RequestError
from fewbits.formats.base import Entry, Refusal
from fewbits.grids import Grid, Int, Params, group_index, groups_of
from fewbits.tensor import Quantized

T = TypeVar("T")
G = TypeVar("G", bound=Grid)


_SEARCH = frozenset({"ratios", "norm", "rule", "quantile", "peak"})


def stored(grid: G) -> G:
    """The part of a grid that a file holds: how its parameters were searched for is not stored anywhere."""
    known: Any = grid
    return replace(known, **{f.name: f.default for f in fields(known) if f.name in _SEARCH})


def describe(grid: Any) -> str:
    """A grid in a few words: its class and fields, search settings left out."""
    if not is_dataclass(grid):
        return str(grid)
    facts = {f.name: getattr(grid, f.name) for f in fields(grid) if f.name not in _SEARCH}
    return f"{type(grid).__name__.lower()}({', '.join(f'{k}={v}' for k, v in facts.items())})"


def usual(grids: Iterable[Int]) -> Int | None:
    """The grid that most modules have; None without any."""
    counted = Counter(stored(g) for g in grids).most_common(1)
    return counted[0][0] if counted else None


def refusals(entries: Sequence[Entry], rule: Callable[[Entry, Any], Iterator[str]], kind: type = Int) -> list[Refusal]:
    """``rule`` applied to every entry whose grid is of ``kind``; other grids and residuals are refused."""
    found = []
    for e in entries:
        if e.residual is not None:
            found.append(
                Refusal(e.name, f"it has no place for a {e.residual} part beside the codes; use format fewbits")
            )
        if isinstance(e.grid, kind):
            found += [Refusal(e.name, reason) for reason in rule(e, e.grid)]
        elif e.grid is not None:
            found.append(
                Refusal(e.name, f"it stores uniform integers only, not {type(e.grid).__name__}; use format fewbits")
            )
    return found


def tensor(
    name: str, tensors: Mapping[str, Tensor], suffix: str, dtypes: Collection[torch.dtype], shape: Sequence[int] | None
) -> Tensor:
    """``tensors[suffix]`` if it is there, of one of ``dtypes`` and of ``shape``; CheckpointError otherwise."""
    if suffix not in tensors:
        raise CheckpointError(f"tensor {name}.{suffix} is missing; the checkpoint is damaged")
    t = tensors[suffix]
    if t.dtype not in dtypes:
        raise CheckpointError(f"tensor {name}.{suffix} is {t.dtype}; expected {' or '.join(map(str, dtypes))}")
    if shape is not None and tuple(t.shape) != tuple(shape):
        raise CheckpointError(f"tensor {name}.{suffix} has shape {list(t.shape)}; expected {list(shape)}")
    return t


SCALES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def finite(name: str, suffix: str, t: Tensor) -> Tensor:
    """``t`` itself; CheckpointError when it holds a NaN or an infinity."""
    if not torch.isfinite(t).all():
        raise CheckpointError(f"tensor {name}.{suffix} holds values that are not finite; the checkpoint is damaged")
    return t


def scattered(name: str, g_idx: Tensor, group: int, groups: int) -> Params:
    """``{"g_idx": ...}`` when groups are not consecutive columns, else nothing; CheckpointError when out of range."""
    if g_idx.numel() and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise CheckpointError(f"tensor {name}.g_idx points outside its {groups} groups; the checkpoint is damaged")
    return {} if torch.equal(g_idx.long(), group_index(len(g_idx), group)) else {"g_idx": g_idx.int()}


def integer(q: Quantized, name: str, layout: str) -> Int:
    """The uniform grid of ``q``; RequestError for anything else, or for codes and parameters that do not fit it."""
    if not isinstance(q.grid, Int) or q.residual is not None:
        raise RequestError(
            f"{name}: format {layout} stores uniform integers without residuals only; use format fewbits"
        )
    g, (out, columns) = q.grid, q.shape
    rows = 1 if g.rows == -1 else out // g.rows
    want = (rows, groups_of(columns, g.group))
    if tuple(q.params["scale"].shape) != want:
        raise RequestError(
            f"{name}: scales of shape {tuple(q.params['scale'].shape)} do not fit the grid; expected {want}"
        )
    if q.params["scale"].dtype != g.dtype:
        raise RequestError(f"{name}: scales are {q.params['scale'].dtype}, the grid says {g.scale}")
    return g


def zeros(q: Quantized, grid: Int) -> Tensor:
    """Zero points as uint8 ``[R, G]``, the middle for symmetric grids."""
    return (
        q.params["zero"] if "zero" in q.params else torch.full_like(q.params["scale"], grid.middle, dtype=torch.uint8)
    )


def columns(q: Quantized, grid: Int) -> Tensor:
    """int32 ``[in]``: the group of each column."""
    return grid.index(q.params, q.shape[1]).to(torch.int32)


def setting(config: Mapping[str, Any], keys: Sequence[str], allowed: Callable[[Any], bool], default: T) -> Any | T:
    """The first of ``keys`` that ``config`` has; CheckpointError when its value is not ``allowed``."""
    for key in keys:
        if config.get(key) is not None:
            if not allowed(config[key]):
                raise CheckpointError(
                    f"quantization_config says {key} = {repr(config[key])[:80]}, which cannot be read"
                )
            return config[key]
    return default


def is_group(value: Any) -> bool:
    return type(value) is int and (value == -1 or value > 0)


def is_flag(value: Any) -> bool:
    return type(value) is bool


def writer() -> str:
    """``fewbits:<version>``, for the configuration's note of who wrote the file."""
    try:
        return f"fewbits:{metadata.version('fewbits')}"
    except metadata.PackageNotFoundError:
        return "fewbits:0"


def indivisible(columns: int, group: int) -> str:
    """Why ``group`` does not fit ``columns``, and the largest power of two that does."""
    fits = next(g for g in (128, 64, 32, 16, 8, 4, 2, 1) if columns % g == 0)
    advice = f"give --group-size {fits}" if fits > 8 else "give --group-size -1"
    return f"its readers want columns in multiples of the group size {group}; {advice}, or use format gptq or fewbits"
