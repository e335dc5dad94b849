"""Putting quantized layers into a model of transformers, and filling them from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewbits import formats
from fewbits.errors import CheckpointError, FewbitsError
from fewbits.formats import Layout
from fewbits.model import locate
from fewbits.model.base import is_linear, is_transposed
from fewbits.model.experts import unstack_experts
from fewbits.model.families import find_family
from fewbits.model.names import match
from fewbits.runtime.linear import QuantLinear
from fewbits.storage import Checkpoint

# Every quantized module of a layout has one of them.
MARKS = frozenset({"qweight", "codes", "filled", "weight_packed", "weight_scale", "weight.absmax", "SCB"})


@dataclass(frozen=True)
class Placed:
    """A layer of the model and where its tensors are: module path in the checkpoint, and their last names."""

    layer: QuantLinear
    module: str
    suffixes: tuple[str, ...]


class _Names:
    """The names of a checkpoint as they would be if nothing were quantized."""

    def __init__(self, names: Iterable[str]):
        self._names = list(names)

    def names(self) -> list[str]:
        return self._names


def find_modules(names: Iterable[str], layout: Layout) -> dict[str, tuple[str, ...]]:
    """Quantized modules by their path in the checkpoint, each with the last names of its tensors."""
    return {m: suffixes for m, suffixes in formats.modules(names, layout).items() if MARKS.intersection(suffixes)}


def place(model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> list[Placed]:
    """Replace every module that the checkpoint has quantized, in place; ``model`` may be on the meta device.

    Raises CheckpointError when a quantized module has no place in the model.
    """
    names = checkpoint.names()
    modules = find_modules(names, layout)
    if any(".experts." in m for m in modules):
        unstack_experts(model)
    owned = {f"{m}.{suffix}" for m, suffixes in modules.items() for suffix in suffixes}
    plain = [n for n in names if n not in owned] + [f"{m}.weight" for m in modules]
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    target = {n: n for n in plain if n in wanted}
    if len(target) < len(plain):  # the rest has other names on disk; finding out which costs half a second
        family = find_family(model.config.model_type)  # type: ignore[union-attr,arg-type]
        prefix, rename = str(getattr(model, "base_model_prefix", "")), locate.renaming(model)
        rest: Any = _Names([n for n in plain if n not in target])
        target |= {s.stored: n for n, s in match(rest, wanted, prefix, family.names, rename)[0].items()}
    return [_replace(model, target, m, modules[m], f"{m}.bias" in checkpoint) for m in modules]


def fill(placed: Sequence[Placed], checkpoint: Checkpoint, layout: Layout) -> None:
    """Read, unpack and prepack the weight of every layer. Raises CheckpointError.

    Whole layers are shared out among torch's threads. Sharing out each of the many short steps of one layer instead
    would make the threads meet thousands of times, and on a busy machine every meeting can cost a time slice.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(lambda p: _fill(p, checkpoint, layout), placed):
                pass
    finally:
        torch.set_num_threads(threads)  # threads started from now on would take over the workers' number


def _fill(p: Placed, checkpoint: Checkpoint, layout: Layout) -> None:
    q = layout.unpack(p.module, {suffix: checkpoint.tensor(f"{p.module}.{suffix}") for suffix in p.suffixes})
    if q.shape != (p.layer.out_features, p.layer.in_features):
        want = (p.layer.out_features, p.layer.in_features)
        raise CheckpointError(f"{p.module} holds a weight of shape {q.shape}; the model needs {want}")
    try:
        p.layer.fill(q)
    except FewbitsError as e:
        raise CheckpointError(f"{p.module}: {e}") from e


def _replace(
    model: nn.Module, target: Mapping[str, str], module: str, suffixes: tuple[str, ...], has_bias: bool
) -> Placed:
    name = target.get(f"{module}.weight")
    path = "" if name is None else name.removesuffix(".weight")
    old = None if name is None else model.get_submodule(path)
    if old is None or not is_linear(old):
        raise CheckpointError(
            f"{module} is quantized in the checkpoint, but the model has no linear layer of that name"
        )
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    out, columns = weight.shape if not is_transposed(old) else tuple(reversed(weight.shape))
    bias = has_bias or getattr(old, "bias", None) is not None
    layer = QuantLinear(columns, out, bias=bias, device=weight.device, dtype=weight.dtype)
    layer.train(old.training)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    return Placed(layer, module, suffixes)
