"""Adapters that begin as the best low-rank part of what rounding lost (LoftQ, arXiv 2310.08659, with one alternation).

Best for the layer's *output* on the training data: with ``G`` the gram matrix of the inputs and ``R = W - Ŵ``, ``B A``
minimises ``tr(E G Eᵀ)``, ``E = R - B A``, at its rank (QERA, arXiv 2410.06040, theorem 1). It is ``U Uᵀ R``, ``U`` the
first left singular vectors of ``R C``, ``C Cᵀ = G``. Training starts closer to the original model than the base is; the
adapter belongs to that base and to no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.finetune.adapter import QuantLora
from fewbits.finetune.data import Row
from fewbits.model import Source, get_weight

OBSERVED = 64
"""Rows of the training data whose inputs are weighed."""
AT_ONCE = 1 << 30
"""Bytes of gram matrices that one pass over the rows gathers."""
DAMP = 1e-6
"""Share of the mean diagonal that is added to a gram matrix."""


@torch.no_grad()
def fill(tuned: Any, source: Source, rows: Sequence[Row]) -> float:
    """Set the adapters of ``tuned``, a PeftModel on a rounded ``source``; the share of the squared error of the layers'
    outputs on ``rows`` that they take back. They must be zero before.
    """
    before = after = 0.0
    layers = dict(tuned.base_model.model.named_modules())
    for i, names, gram in _grams(tuned, source, layers, rows[:OBSERVED]):
        C = torch.linalg.cholesky(gram + DAMP * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram)))
        weights = dict(source.linears(source.block(i)))
        for local in names:
            layer = layers[f"{source.block_prefix(i)}.{local}"]
            name, R = (
                layer.active_adapters[0],
                get_weight(weights[local]).double() - layer.get_base_layer().dequantize(),
            )
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


def _grams(
    tuned: Any, source: Source, layers: dict[str, nn.Module], rows: Sequence[Row]
) -> Iterator[tuple[int, list[str], Tensor]]:
    """For each block and input of it: its number, the adapted layers that read it, and the gram matrix, float64. Many
    at a time: as many passes over the rows as ``AT_ONCE`` makes necessary.
    """
    waiting: list[tuple[int, list[str], int]] = []
    for i in range(source.n_blocks):
        for stage in source.stages(source.skeleton(i)):
            # an adapted layer may be no target of the adapter, or part of a stack of experts
            names = [n for n in stage if isinstance(layers.get(f"{source.block_prefix(i)}.{n}"), QuantLora)]
            if names:
                waiting.append((i, names, layers[f"{source.block_prefix(i)}.{names[0]}"].in_features))  # type: ignore[arg-type]
    while waiting:
        here, size = 0, 0
        while here < len(waiting) and (not here or size + 4 * waiting[here][2] ** 2 <= AT_ONCE):
            size += 4 * waiting[here][2] ** 2
            here += 1
        now, waiting = waiting[:here], waiting[here:]
        sums = [torch.zeros(width, width) for _, _, width in now]
        hooks = [
            layers[f"{source.block_prefix(i)}.{names[0]}"].register_forward_pre_hook(_adding(total))
            for (i, names, _), total in zip(now, sums, strict=True)
        ]
        for row in rows:
            tuned(input_ids=row.ids[None], position_ids=row.positions[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for (i, names, _), total in zip(now, sums, strict=True):
            yield i, names, total.double()


def _adding(total: Tensor) -> Any:
    def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].reshape(-1, total.shape[0]).float()
        total.addmm_(x.T.to(total.device), x.to(total.device))

    return add
