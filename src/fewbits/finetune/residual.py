"""Adapters that begin as the best low-rank part of what rounding lost (LoftQ, arXiv 2310.08659, with one alternation).

Best for the layer's *output* on the training data: with ``G`` the gram matrix of the inputs and ``R = W - Ŵ``, ``B A``
minimises ``tr(E G Eᵀ)``, ``E = R - B A``, at its rank (QERA, arXiv 2410.06040). It is ``U Uᵀ R``, ``U`` the
first left singular vectors of ``R C``, ``C Cᵀ = G``. For the layer that makes attention's values ``G`` is that of what
attention makes of the inputs (:mod:`fewbits.pipeline.mixing`). Training starts closer to the original model than the
base is; the adapter belongs to that base and to no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.finetune.adapter import QuantLora
from fewbits.finetune.data import Row
from fewbits.finetune.model import observe
from fewbits.model import Source, get_weight
from fewbits.pipeline.mixing import Mixing

OBSERVED = 64
"""Rows of the training data whose inputs are weighed."""
AT_ONCE = 1 << 30
"""Bytes of gram matrices after which another pass over the rows begins."""
DAMP = 1e-6
"""Share of the mean diagonal that is added to a gram matrix."""


@torch.no_grad()
def fill(tuned: Any, source: Source, rows: Sequence[Row]) -> float:
    """Set the adapters of ``tuned``, a PeftModel on a rounded ``source``; the share of the squared error of the layers'
    outputs on ``rows``, each layer by itself, that they take back.
    """
    before = after = 0.0
    layers = _adapted(tuned, source)
    for i, gram in _grams(tuned, source, layers, rows[:OBSERVED]):
        block = source.linears(source.block(i))
        for read, G in gram.items():
            C = torch.linalg.cholesky(G + DAMP * G.diagonal().mean().clamp(min=1e-30) * torch.eye(len(G)))
            for local, layer in layers[i][read].items():
                R = get_weight(block[local]).double() - layer.get_base_layer().dequantize()
                name = layer.active_adapters[0]
                A, B = low_rank(R, layer.r[name], C)
                root = layer.scaling[name] ** 0.5
                layer.lora_A[name].weight.copy_(A / root)
                layer.lora_B[name].weight.copy_(B / root)
                before += float((R @ C).square().sum())
                after += float(((R - B @ A) @ C).square().sum())
    return 1 - after / before if before else 0.0


def low_rank(R: Tensor, r: int, C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]``, each row of one as long as the column of the other; ``(R - B A) C`` is the
    smallest at rank ``r`` (``C [in, in]``; None: the identity). From the eigenvectors of the smaller of ``M Mᵀ`` and
    ``Mᵀ M``, ``M = R C``. Where ``r`` exceeds the rank the rest is zero.
    """
    M = R if C is None else R @ C
    wide = R.shape[0] <= R.shape[1]
    energy, U = torch.linalg.eigh(M @ M.T if wide else M.T @ M)
    energy, U = energy.flip(0)[:r].clamp(min=0), U.flip(1)[:, :r]
    s = energy.sqrt()
    some = s > s[:1] * 1e-7
    U = U if wide else M @ U / torch.where(some, s, 1)
    part = U.T @ R
    root = torch.where(some, part.norm(dim=1), 1).sqrt()
    A, B = R.new_zeros(r, R.shape[1]), R.new_zeros(R.shape[0], r)
    A[: len(s)] = torch.where(some, 1 / root, 0)[:, None] * part
    B[:, : len(s)] = U * torch.where(some, root, 0)
    return A, B


def _adapted(tuned: Any, source: Source) -> list[dict[str, dict[str, QuantLora]]]:
    """For each block and input of it, named after the first layer that reads it, the adapted layers that do, by their
    names in the block.
    """
    modules, values, found = dict(tuned.base_model.model.named_modules()), source.family.values, []
    for i in range(source.n_blocks):
        inputs: dict[str, dict[str, QuantLora]] = {}
        for names in source.stages(source.skeleton(i)):
            for n in names:
                layer = modules.get(f"{source.block_prefix(i)}.{n}")
                if isinstance(layer, QuantLora):  # others are no targets, or parts of a stack of experts
                    inputs.setdefault(values if n == values else names[0], {})[n] = layer
        found.append(inputs)
    return found


def _grams(
    tuned: Any, source: Source, layers: Sequence[Mapping[str, Mapping[str, QuantLora]]], rows: Sequence[Row]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """For each block the gram matrices of its inputs in the base, float64; blocks that fit into ``AT_ONCE`` together
    share a pass over the rows.
    """
    widths = [{read: next(iter(here.values())).in_features for read, here in inputs.items()} for inputs in layers]
    mixings, begin = _mixings(tuned, source), 0
    while begin < len(layers):
        end, size = begin, 0
        while end < len(layers) and (end == begin or size < AT_ONCE):
            size += sum(4 * w * w for w in widths[end].values())
            end += 1
        sums = [{read: torch.zeros(w, w) for read, w in widths[i].items()} for i in range(begin, end)]
        watched: dict[nn.Module, Any] = {
            next(iter(layers[i][read].values())): partial(
                _add, total, mixings[i] if read == source.family.values else None
            )
            for i, of_block in enumerate(sums, begin)
            for read, total in of_block.items()
        }
        with tuned.disable_adapter(), ExitStack() as stack:
            for mixing in mixings:
                stack.enter_context(mixing.watched())
            observe(tuned, watched, rows)
        for i, of_block in enumerate(sums, begin):
            yield i, {stage: total.double() for stage, total in of_block.items()}
        begin = end


def _mixings(tuned: Any, source: Source) -> list[Mixing]:
    """Of each block, in families whose values have a layer of their own."""
    if not source.family.values:
        return []
    blocks = (tuned.base_model.model.get_submodule(source.block_prefix(i)) for i in range(source.n_blocks))
    return [Mixing(block, source.family.values) for block in blocks]


def _add(total: Tensor, mixing: Mixing | None, x: Tensor) -> None:
    mixed = None if mixing is None else mixing(x)
    x = (x if mixed is None else mixed).reshape(-1, len(total)).float()
    total.addmm_(x.T, x)
