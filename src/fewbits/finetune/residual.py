"""Adapters that begin as the best low-rank part of what rounding lost (LoftQ, arXiv 2310.08659, with one alternation).

Best for the layer's *output* on the training data: with ``G`` the gram matrix of the inputs and ``R = W - Ŵ``, ``B A``
minimises ``tr(E G Eᵀ)``, ``E = R - B A``, at its rank (QERA, arXiv 2410.06040). It is ``U Uᵀ R``, ``U`` the
first left singular vectors of ``R C``, ``C Cᵀ = G``. Training starts closer to the original model than the base is; the
adapter belongs to that base and to no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.finetune.adapter import QuantLora
from fewbits.finetune.data import Row
from fewbits.finetune.model import observe
from fewbits.model import Source, get_weight

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
    for i, gram in _grams(tuned, layers, rows[:OBSERVED]):
        block = source.linears(source.block(i))
        for stage, G in gram.items():
            C = torch.linalg.cholesky(G + DAMP * G.diagonal().mean().clamp(min=1e-30) * torch.eye(len(G)))
            for local, layer in layers[i][stage].items():
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


def _adapted(tuned: Any, source: Source) -> list[dict[int, dict[str, QuantLora]]]:
    """For each block and input of it the adapted layers that read it, by their names in the block."""
    modules, found = dict(tuned.base_model.model.named_modules()), []
    for i in range(source.n_blocks):
        stages = {}
        for stage, names in enumerate(source.stages(source.skeleton(i))):
            # others are no targets, or parts of a stack of experts
            here = {n: m for n in names if isinstance(m := modules.get(f"{source.block_prefix(i)}.{n}"), QuantLora)}
            if here:
                stages[stage] = here
        found.append(stages)
    return found


def _grams(
    tuned: Any, layers: Sequence[Mapping[int, Mapping[str, QuantLora]]], rows: Sequence[Row]
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """For each block the gram matrices of its inputs in the base, float64; blocks that fit into ``AT_ONCE`` together
    share a pass over the rows.
    """
    widths = [{stage: next(iter(here.values())).in_features for stage, here in stages.items()} for stages in layers]
    begin = 0
    while begin < len(layers):
        end, size = begin, 0
        while end < len(layers) and (end == begin or size < AT_ONCE):
            size += sum(4 * w * w for w in widths[end].values())
            end += 1
        sums = [{stage: torch.zeros(w, w) for stage, w in widths[i].items()} for i in range(begin, end)]
        watched: dict[nn.Module, Any] = {
            next(iter(layers[i][stage].values())): partial(_add, total)
            for i, of_block in enumerate(sums, begin)
            for stage, total in of_block.items()
        }
        with tuned.disable_adapter():
            observe(tuned, watched, rows)
        for i, of_block in enumerate(sums, begin):
            yield i, {stage: total.double() for stage, total in of_block.items()}
        begin = end


def _add(total: Tensor, x: Tensor) -> None:
    x = x.reshape(-1, len(total)).float()
    total.addmm_(x.T, x)
