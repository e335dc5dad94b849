"""Adapters that begin as the best low-rank part of what rounding lost: LoftQ (arXiv 2310.08659) with one alternation.

``scale * B A`` is ``W - Ŵ`` cut to rank ``r``: no adapter of that rank is nearer (Eckart and Young).
Training then starts closer to the original model than the base is; the adapter belongs to that base and to no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.finetune.adapter import QuantLora
from fewbits.model import Source, get_weight


@torch.no_grad()
def fill(tuned: Any, source: Source) -> float:
    """Set the adapters of ``tuned``, a PeftModel on a rounded ``source``, block by block; the share of the rounding's
    squared error that they take back.
    """
    before = after = 0.0
    layers = dict(tuned.base_model.model.named_modules())
    for i in range(source.n_blocks):
        for local, module in source.linears(source.block(i)).items():
            layer = layers.get(f"{source.block_prefix(i)}.{local}")
            if not isinstance(layer, QuantLora):  # not a target, or part of a stack of experts
                continue
            name, R = layer.active_adapters[0], get_weight(module).double() - layer.get_base_layer().dequantize()
            A, B = low_rank(R, layer.r[name])
            root = layer.scaling[name] ** 0.5
            layer.lora_A[name].weight.copy_(A / root)
            layer.lora_B[name].weight.copy_(B / root)
            before += float(R.square().sum())
            after += float((R - B @ A).square().sum())
    return 1 - after / before if before else 0.0


def low_rank(R: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]`` of equal norms, ``B A`` the nearest matrix of rank ``r`` to ``R [out, in]``.

    From the eigenvectors of the smaller of ``R Rᵀ`` and ``Rᵀ R``: ``U Uᵀ R`` is what the singular values would give.
    Where ``r`` exceeds the rank the rest is zero.
    """
    if R.shape[0] > R.shape[1]:
        B, A = low_rank(R.T, r)
        return A.T, B.T
    energy, U = torch.linalg.eigh(R @ R.T)
    energy, U = energy.flip(0)[:r].clamp(min=0), U.flip(1)[:, :r]
    s = energy.sqrt()
    some = s > s[:1] * 1e-7
    root = torch.where(some, s, 1).sqrt()
    A, B = R.new_zeros(r, R.shape[1]), R.new_zeros(R.shape[0], r)
    A[: len(s)] = torch.where(some, 1 / root, 0)[:, None] * (U.T @ R)
    B[:, : len(s)] = U * torch.where(some, root, 0)
    return A, B
