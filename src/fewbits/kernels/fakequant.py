"""Fake quantization to a uniform grid with straight-through gradients, one pass over the weight each way.

With ``u = w / s`` and ``v = clamp(round(u) + z, qmin, qmax)`` the fake weight is ``(v - z) s``. Where nothing is
clipped its gradient is that of ``w``, and ``v - z - u`` times it that of ``s``; a clipped weight gets none, and ``s``
then ``v - z`` times it (LSQ, arXiv 1902.08153, eq. 3). The floor is the memory's bandwidth: 8 bytes a weight forward,
12 backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.kernels._table import C, native, register, require, shape, threads

register(
    "fake_affine",
    "(w: f32[R,n], s: f32[R,G], z: f32[R,G], group, qmin, qmax) -> f32[R,n], differentiable in w and s",
    lambda level: {"portable": "baseline vectors", "avx2": "AVX2"}.get(level, "AVX-512"),
)


def fake_affine(w: Tensor, s: Tensor, z: Tensor, group: int, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round(w / s) + z, qmin, qmax) - z) s`` float32 ``[R, n]``; ``s`` positive and ``z``, integers, ``[R,
    G]``, one for each ``group`` columns of a row (-1: all of them).

    Codes lie within -1024 and 1024. Rounds to even; NaN stays NaN. Gradients reach ``w`` and ``s``; neither they nor
    the result depend on the number of threads. Raises RequestError on wrong shapes or dtypes.
    """
    group = w.shape[-1] if group == -1 else group
    require(
        w.ndim == 2
        and w.dtype == s.dtype == z.dtype == torch.float32
        and group > 0
        and s.shape == z.shape == (len(w), -(-w.shape[1] // group)),
        f"fake_affine needs w float32[R, n] and s, z float32[R, groups of {group}]; got {shape(w)}, {shape(s)} and "
        f"{shape(z)}",
    )
    made: Tensor = _FakeAffine.apply(w, s, z, group, qmin, qmax)
    return made


class _FakeAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, z: Tensor, *rest: int) -> Tensor:
        w, s, z = (t.contiguous() for t in (w, s, z))
        ctx.save_for_backward(w, s, z)
        ctx.rest = rest
        if not native(w, s, z):
            return reference_fake_affine(w, s, z, *rest)
        out = torch.empty_like(w)
        C.fake_affine(*(t.data_ptr() for t in (w, s, z, out)), *w.shape, *rest, threads())
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, s, z = ctx.saved_tensors
        g = g.contiguous()
        if not native(w, s, z, g):
            return *reference_fake_affine_grad(g, w, s, z, *ctx.rest), None, None, None, None
        of_w, of_s = torch.empty_like(w), torch.empty_like(s)
        addresses = (t.data_ptr() for t in (w, s, z, of_w))
        C.fake_affine_grad(*addresses, *w.shape, *ctx.rest, g.data_ptr(), of_s.data_ptr(), threads())
        return of_w, of_s, None, None, None, None


def reference_fake_affine(w: Tensor, s: Tensor, z: Tensor, group: int, qmin: int, qmax: int) -> Tensor:
    """The specification, to the bit."""
    s, z = _spread(s, group, w), _spread(z, group, w)
    return ((torch.round(w / s) + z).clamp(qmin, qmax) - z) * s


def reference_fake_affine_grad(
    g: Tensor, w: Tensor, s: Tensor, z: Tensor, group: int, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """The gradients of ``w``, to the bit, and of ``s``, up to the order of its sum, for the gradient ``g`` of what
    :func:`fake_affine` gives."""
    wide, z = _spread(s, group, w), _spread(z, group, w)
    u = w / wide
    at = torch.round(u) + z
    v = at.clamp(qmin, qmax)
    of_w = torch.where(at == v, g, 0)
    of_s = torch.zeros_like(s).index_add_(1, _groups(group, w), g * (v - z) - of_w * u)
    return of_w, of_s


def _groups(group: int, w: Tensor) -> Tensor:
    return torch.arange(w.shape[1], device=w.device) // group


def _spread(p: Tensor, group: int, w: Tensor) -> Tensor:
    return p.index_select(1, _groups(group, w))
