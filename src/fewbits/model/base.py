"""What a model family is: names of weights in execution order, and the channel axes that two sides of a block share.

A *site* is a channel axis with one producer (a norm or a linear layer) and every reader of its output. Multiplying the
producer by ``1/s`` and the readers' columns by ``s`` leaves the function as it is: all that AWQ and SmoothQuant need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import RequestError


@dataclass(frozen=True)
class SiteRule:
    """A site as the table of a family gives it; ``{e}`` stands for each expert.

    ``rows`` names the part of a fused producer that counts ("v" or "up"), ``heads`` says that grouped queries repeat
    the producer's channels, ``requires`` is a field of the config and the value without which the site is not legal.
    """

    producer: str
    kind: str
    consumers: tuple[str, ...]
    also: tuple[str, ...] = ()
    rows: str | None = None
    heads: bool = False
    requires: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Family:
    """Names of one architecture; every path is relative to a block.

    * ``stages``: linears that share one input, in execution order; names that a block lacks are skipped
    * ``ties``: linears that servers fuse, so they want one grid
    * ``values``: the layer that makes attention's values and nothing else
    * ``names``: (part of a name on disk, the same part in memory), applied in order, for checkpoints that transformers
      converts while loading
    """

    model_types: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    sites: tuple[SiteRule, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    values: str = ""
    names: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Site:
    """A site of one block. ``kind``: "norm" (scales by w), "norm+1" (scales by 1 + w) or "linear" (rows).

    ``also`` are readers of the same activation that are never quantized (a router). ``rows`` is the range of a fused
    producer's rows that counts, ``heads`` = (kv heads, queries per kv head, head size) under grouped-query attention.
    """

    producer: str
    kind: str
    consumers: tuple[str, ...]
    also: tuple[str, ...] = ()
    rows: tuple[int, int] | None = None
    heads: tuple[int, int, int] | None = None

    def size(self, block: nn.Module) -> int:
        """Number of channels: the length of ``s`` in :func:`fold`."""
        if self.rows is not None:
            return self.rows[1] - self.rows[0]
        return int(get_weight(block.get_submodule(self.producer)).shape[0])

    def expand(self, s: Tensor) -> Tensor:
        """``s [size]`` as the consumers' columns see it: repeated over the queries of a key-value head."""
        if self.heads is None:
            return s
        kv, repeat, dim = self.heads
        return s.view(kv, 1, dim).expand(kv, repeat, dim).reshape(-1)

    def reduce(self, columns: Tensor) -> Tensor:
        """Mean over the columns that share one channel: a statistic per consumer column, made one per channel."""
        if self.heads is None:
            return columns
        kv, repeat, dim = self.heads
        return columns.view(kv, repeat, dim).mean(1).reshape(-1)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored ``[in, out]``: transformers' Conv1D, which only GPT-2 and its kin use."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain matrix product that can be quantized."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def get_weight(module: nn.Module) -> Tensor:
    """The weight as ``[out, in]`` (a view); a norm's weight as it is."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.t() if is_transposed(module) else weight


def set_weight(module: nn.Module, w: Tensor) -> None:
    """Write ``w [out, in]`` into the module, in its own dtype and orientation. Raises ValueError on another shape."""
    target = get_weight(module)
    if target.shape != w.shape:
        raise ValueError(f"weight of shape {tuple(w.shape)} given, the module holds {tuple(target.shape)}")
    target.copy_(w)


@torch.no_grad()
def fold(block: nn.Module, site: Site, s: Tensor) -> None:
    """Replace the activation ``x`` of ``site`` by ``x / s``, in place and without changing the block's function.

    ``s [site.size(block)]`` is positive; the arithmetic is float64, the results are cast back to each weight's dtype.
    Raises RequestError when ``s`` has another length or a value that is not positive and finite.
    """
    if s.shape != (site.size(block),) or not bool((torch.isfinite(s) & (s > 0)).all()):
        raise RequestError(f"scale for {site.producer} must be {site.size(block)} positive finite numbers")
    s = s.double()
    producer = block.get_submodule(site.producer)
    start, stop = site.rows or (0, len(s))
    if site.kind == "linear":
        w = get_weight(producer)[start:stop]
        w.copy_(w.double() / s[:, None])
    else:
        offset = 1.0 if site.kind == "norm+1" else 0.0
        w = get_weight(producer)
        w.copy_((w.double() + offset) / s - offset)
    bias = getattr(producer, "bias", None)
    if bias is not None:
        bias[start:stop] = (bias[start:stop].double() / s).to(bias.dtype)
    columns = site.expand(s)
    for name in site.consumers + site.also:
        w = get_weight(block.get_submodule(name))
        w.copy_(w.double() * columns)


def expanded(names: tuple[str, ...], experts: int) -> Iterator[str]:
    """Names with ``{e}`` written out for every expert."""
    for name in names:
        yield from (name.format(e=e) for e in range(experts)) if "{e}" in name else (name,)
