"""Weighted k-means in one dimension, one problem per row, to the optimum (SqueezeLLM's tables, arXiv 2306.07629)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fewbits.kernels._table import C, native, register, require, shape, threads

register("kmeans", "(v: f32[R,n], f: f32[R,n], k) -> centers f32[R,k], rising", lambda level: "exact, double precision")


def kmeans(v: Tensor, f: Tensor, k: int) -> Tensor:
    """Centers float32 ``[R, k]``, rising, that minimise ``Σ f (v - nearest center)²`` in each row of ``v [R, n]``.

    ``f [R, n]``, not negative, says what an error of each number costs. Rows of fewer than ``k`` numbers repeat the
    last center. Raises RequestError on wrong shapes.
    """
    require(
        v.ndim == 2 and v.shape == f.shape and v.shape[1] > 0 and k > 0,
        f"kmeans needs v and f of one shape [R, n] and k > 0; got {shape(v)}, {shape(f)} and {k}",
    )
    v, order = v.detach().float().sort(dim=1, stable=True)
    f = f.detach().float().gather(1, order).contiguous()
    if not native(v, f):
        return reference_kmeans(v, f, k)
    centers = torch.empty(len(v), k)
    C.kmeans(v.data_ptr(), f.data_ptr(), centers.data_ptr(), len(v), v.shape[1], k, threads())
    return centers


def reference_kmeans(v: Tensor, f: Tensor, k: int) -> Tensor:
    """The specification, for rows already sorted: the dynamic programme over every place of every cut, float64,
    O(k n²) for each row.

    ``D_m[j] = min_i D_{m-1}[i] + cost(i, j)``: the first ``j`` numbers in ``m`` clusters, the last one ``(i, j]``.
    """
    n, found = v.shape[1], []
    for row, weight in zip(v.double(), f.double(), strict=True):
        mean = (row * weight).sum() / weight.sum().clamp(min=1e-300)
        zero = row.new_zeros(1)
        A0, A1 = (torch.cat([zero, t.cumsum(0)]) for t in (weight, weight * (row - mean)))
        mass = A0[None] - A0[:, None]  # [i, j]
        gain = torch.where(mass > 0, (A1[None] - A1[:, None]).square() / mass.clamp(min=1e-300), 0)
        later = torch.arange(n + 1)[:, None] < torch.arange(n + 1)
        D, starts = gain[0], []
        for _ in range(1, min(k, n)):
            D, start = torch.where(later, D[:, None] + gain, -torch.inf).max(0)
            starts.append(start)
        ends = [n]
        for start in reversed(starts):
            ends.append(int(start[ends[-1]]))
        cuts = [0, *reversed(ends)]
        centers = [_center(row, weight, a, b) for a, b in pairwise(cuts)]
        found.append(torch.stack(centers + [centers[-1]] * (k - len(centers))))
    return torch.stack(found).float()


def _center(row: Tensor, weight: Tensor, a: int, b: int) -> Tensor:
    mass = weight[a:b].sum()
    return (row[a:b] * weight[a:b]).sum() / mass if mass > 0 else row[a:b].mean()
