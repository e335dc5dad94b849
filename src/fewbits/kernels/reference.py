"""Plain torch: the specification of every op, on any device. Letters as in the schemas of ``kernels/__init__.py``."""

from __future__ import annotations

import torch
from torch import Tensor

# Scales never round to zero: halves keep their subnormals, the wide formats stop at the smallest normal number, whose
# reciprocal is finite.
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


def gram_(G: Tensor, x: Tensor) -> None:
    """``G += x^T x``, summed in float32, exactly symmetric."""
    x = x.float()
    update = x.T @ x
    G += update.triu() + update.triu(1).T


def cross_(C: Tensor, y: Tensor, x: Tensor) -> None:
    """``C += y^T x``, summed in float32."""
    C += y.float().T @ x.float()


def store_scale(s: Tensor, dtype: torch.dtype) -> Tensor:
    """``s`` rounded to ``dtype``, ties to even, kept finite and positive; float32."""
    return s.to(dtype).float().clamp(SMALLEST[dtype], torch.finfo(dtype).max)


def fit_affine(
    w: Tensor,
    group: int,
    qmax: int,
    symmetric: bool,
    ratios: Tensor,
    importance: Tensor | None,
    scale_dtype: torch.dtype,
    norm: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`fewbits.kernels.fit_affine`; the arithmetic of scale and zero is exact to the last bit."""
    rows, columns = w.shape
    groups = -(-columns // group)
    # Zeros change neither lo nor hi, and with weight 0 no error.
    padded = torch.nn.functional.pad(w, (0, groups * group - columns)).view(rows, groups, group)
    weight = torch.ones(columns, device=w.device) if importance is None else importance.float()
    weight = torch.nn.functional.pad(weight, (0, groups * group - columns)).view(groups, group)
    lo, hi = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    best = torch.full_like(lo, float("inf"))
    best_scale, best_zero = _candidate(lo, hi, ratios[0], qmax, symmetric, scale_dtype)
    for ratio in ratios.to(w.device, torch.float32):
        scale, zero = _candidate(lo, hi, ratio, qmax, symmetric, scale_dtype)
        s, z = scale[..., None], zero[..., None]
        code = (torch.round(padded / s) + z).clamp(0, qmax)
        error = ((padded - s * (code - z)).abs().pow(norm) * weight).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    empty = (lo == 0) & (hi == 0)
    return torch.where(empty, 1.0, best_scale), best_zero


def _candidate(
    lo: Tensor, hi: Tensor, ratio: Tensor, qmax: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if symmetric:
        most = torch.maximum(-lo, hi)
        scale = store_scale(2 * most * ratio[1] / qmax, scale_dtype)
        return scale, torch.full_like(scale, (qmax + 1) / 2)
    low, high = lo * ratio[0], hi * ratio[1]
    scale = store_scale((high - low) / qmax, scale_dtype)
    return scale, torch.round(-low / scale).clamp(0, qmax)


def sweep_block_(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, segment: Tensor, qmax: int
) -> tuple[Tensor, Tensor]:
    """See :func:`fewbits.kernels.sweep_block_`; every operation is rounded by itself (no fused multiply-add)."""
    codes, err = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
    for j, g in enumerate(segment.tolist()):
        s, z = scale[:, g], zero[:, g]
        code = (torch.round(w[:, j] / s) + z).clamp(0, qmax)
        e = (w[:, j] - s * (code - z)) / u[j, j]
        w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
        codes[:, j], err[:, j] = code.to(torch.uint8), e
    return codes, err


def sweep_kept_(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, segment: Tensor, qmax: int, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fewbits.kernels.sweep_kept_`; every operation is rounded by itself."""
    codes, err = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
    kept = torch.zeros_like(w, dtype=torch.float16)
    for j, g in enumerate(segment.tolist()):
        s, z = scale[:, g], zero[:, g]
        code = torch.round(w[:, j] / s + z).clamp(0, qmax)
        left = w[:, j] - s * (code - z)
        kept[:, j] = torch.where((left / u[j, j]).square() > limit, left, 0)
        e = (left - kept[:, j].to(w.dtype)) / u[j, j]
        w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
        codes[:, j], err[:, j] = code.to(torch.uint8), e
    return codes, err, kept


def fixed_point(x: Tensor, depth: int = 128, most: int = 4095) -> Tensor:
    """``x [..., n]`` as fixed-point products see it: runs of ``depth`` along the last dimension, each rounded to whole
    multiples of its largest magnitude / ``most``."""
    runs = torch.nn.functional.pad(x, (0, -x.shape[-1] % depth)).unflatten(-1, (-1, depth))
    top = runs.abs().amax(-1, keepdim=True)
    top = torch.where(runs.isfinite().all(-1, keepdim=True), top, torch.nan)
    used = torch.where(top < 1e-30, torch.inf, top)
    codes = torch.round(runs * torch.div(torch.tensor(float(most), device=x.device), used))  # not by a reciprocal
    return (codes * torch.where(top < 1e-30, 0.0, top / most)).flatten(-2)[..., : x.shape[-1]]


def fixed_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`fewbits.kernels.fixed.fixed_linear`."""
    return torch.nn.functional.linear(fixed_point(x), fixed_point(w), bias)


def few_linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group: int, bias: Tensor | None) -> Tensor:
    """See :func:`fewbits.kernels.few.few_linear`."""
    s, z = (t.repeat_interleave(group, 1)[:, : codes.shape[1]] for t in (scale, zero))
    return torch.nn.functional.linear(fixed_point(x, 32, 127), (codes - z) * s, bias)


def fixed_gram_(G: Tensor, x: Tensor) -> None:
    """See :func:`fewbits.kernels.fixed.fixed_gram_`."""
    gram_(G, fixed_point(x.T).T)


def fixed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """See :func:`fewbits.kernels.fixed.fixed_attention`."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = fixed_point(q) @ fixed_point(k).mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    return fixed_point(weights) @ fixed_point(v.mT).mT / total


def fixed_cross_(C: Tensor, y: Tensor, x: Tensor) -> None:
    """See :func:`fewbits.kernels.fixed.fixed_cross_`."""
    cross_(C, fixed_point(y.T).T, fixed_point(x.T).T)
