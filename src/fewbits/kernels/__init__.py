"""The few operations that cost the time, each with a plain-torch specification (``reference.py``) and C++ for the CPU.

No result depends on the number of threads: every element is computed by one thread, in a fixed order. ``fit_affine``
and ``sweep_block_`` give the same bits on every CPU; ``gram_`` rounds differently where the hardware multiplies
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels import reference
from fewbits.kernels._table import (
    C,
    Choice,
    info,
    level,
    multiplies_bf16,
    native,
    register,
    require,
    schemas,
    shape,
    threads,
)

__all__ = [
    "SUMS",
    "Choice",
    "Sums",
    "cross_",
    "fit_affine",
    "gram_",
    "info",
    "level",
    "multiplies_bf16",
    "one_thread",
    "schemas",
    "sweep_block_",
    "sweep_kept_",
]

SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_CANDIDATES, MAX_BLOCK = 1024, 256


def _vectors(level: str) -> str:
    return {"portable": "baseline vectors", "avx2": "AVX2"}.get(level, "AVX-512")


def _gram_uses(level: str) -> str:
    return "AMX tiles for bfloat16, AVX-512 FMA for float32" if level == "amx" else f"{_vectors(level)}, float32"


register("gram_", "(G: f32[n,n], x: bf16|f32[T,n]) -> None, G += x^T x", _gram_uses)
register("cross_", "(C: f32[m,n], y: bf16|f32[T,m], x: like y [T,n]) -> None, C += y^T x", _gram_uses)
register(
    "fit_affine",
    "(w: f32[R,C], group, qmax, symmetric, ratios: f32[K,2], importance: f32[C]|None, scale_dtype, norm)"
    " -> (scale f32[R,G], zero f32[R,G])",
    _vectors,
)
register(
    "sweep_block_",
    "(w: f32[R,B], u: f32[B,B], scale: f32[R,S], zero: f32[R,S], segment: i32[B], qmax)"
    " -> (codes u8[R,B], err f32[R,B])",
    _vectors,
)
register(
    "sweep_kept_",
    "(w: f32[R,B], u: f32[B,B], scale: f32[R,S], zero: f32[R,S], segment: i32[B], qmax, limit)"
    " -> (codes u8[R,B], err f32[R,B], kept f16[R,B])",
    _vectors,
)


@contextmanager
def one_thread() -> Iterator[None]:
    """For torch's own sums and factorisations: their order, hence their rounding, depends on the number of threads; a
    result must not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gram_(G: Tensor, x: Tensor) -> None:
    """``G += x^T x`` in place, both triangles; ``G`` float32 ``[n, n]`` must be symmetric, ``x`` ``[T, n]``.

    Products of bfloat16 are exact and are summed in float32; float32 ``x`` uses fused multiply-adds. The result is
    exactly symmetric. Other floating dtypes are converted to float32 first. Raises RequestError on wrong shapes or
    dtypes.
    """
    n = G.shape[-1]
    require(
        G.dtype == torch.float32 and G.shape == (n, n) and x.ndim == 2 and x.shape[1] == n and x.is_floating_point(),
        f"gram_ needs G float32[n, n] and x floating[T, n]; got {shape(G)} and {shape(x)}",
    )
    require(G.device == x.device, f"gram_ needs both on one device; got {shape(G)} and {shape(x)}")
    if not native(G, x) or not G.is_contiguous():
        reference.gram_(G, x)
        return
    if x.numel() == 0:
        return
    x = x.detach() if x.dtype in (torch.float32, torch.bfloat16) else x.detach().float()
    x = x if x.stride(1) == 1 else x.contiguous()
    C.gram(G.data_ptr(), x.data_ptr(), len(x), n, x.stride(0), x.dtype == torch.bfloat16, threads())


def cross_(C_: Tensor, y: Tensor, x: Tensor) -> None:
    """``C_ += y^T x`` in place; ``C_`` float32 ``[m, n]``, ``y [T, m]`` and ``x [T, n]`` of one dtype.

    Summed as :func:`gram_` sums. Raises RequestError on wrong shapes or dtypes.
    """
    require(
        C_.dtype == torch.float32
        and x.is_floating_point()
        and x.ndim == y.ndim == 2
        and len(x) == len(y)
        and C_.shape == (y.shape[1], x.shape[1])
        and y.dtype == x.dtype
        and y.device == x.device == C_.device,
        f"cross_ needs C float32[m, n], y floating[T, m] and x like it [T, n]; got {shape(C_)}, {shape(y)} and "
        f"{shape(x)}",
    )
    if not native(C_, x) or not C_.is_contiguous():
        reference.cross_(C_, y, x)
        return
    if not x.numel() or not y.numel():
        return
    wide = x.dtype not in (torch.float32, torch.bfloat16)
    y, x = (t.detach().float() if wide else t.detach() for t in (y, x))
    y, x = (t if t.stride(1) == 1 else t.contiguous() for t in (y, x))
    addresses = (C_.data_ptr(), y.data_ptr(), x.data_ptr())
    C.cross(*addresses, len(x), *C_.shape, y.stride(0), x.stride(0), x.dtype == torch.bfloat16, threads())


@dataclass(frozen=True)
class Sums:
    """How products of inputs are added up: ``gram_(G, x)`` and ``cross_(C, y, x)``."""

    gram_: Callable[[Tensor, Tensor], None]
    cross_: Callable[[Tensor, Tensor, Tensor], None]


SUMS = Sums(gram_, cross_)


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
    """Scale and zero point of each group of ``group`` columns (-1: whole rows; the last group may be short).

    ``w`` float32 ``[R, C]``. Per group ``lo = min(0, min w)``, ``hi = max(0, max w)``; each row ``(rl, rh)`` of
    ``ratios [K, 2]`` is a candidate: affine ``s = (hi*rh - lo*rl) / qmax``, symmetric ``s = 2*max(-lo, hi)*rh / qmax``
    with zero ``(qmax + 1) / 2``. ``s`` is rounded to ``scale_dtype`` (saturating, never 0), and then
    ``zero = clamp(rint(-lo*rl / s), 0, qmax)``. The candidate with the smallest
    ``Σ importance * |w - s*(code - zero)|^norm`` wins, the first of equals. All-zero groups get scale 1. Returns
    ``(scale, zero)``, float32 ``[R, G]``; the scale is exact in ``scale_dtype``.
    Raises RequestError on wrong shapes, dtypes or ranges.
    """
    rows, columns = _check_fit(w, group, qmax, ratios, importance, scale_dtype, norm)
    group = columns if group == -1 else min(group, columns)
    if not native(w, ratios, importance) or len(ratios) > MAX_CANDIDATES:
        return reference.fit_affine(w, group, qmax, symmetric, ratios, importance, scale_dtype, norm)
    w, ratios = w.detach().contiguous(), ratios.float().contiguous()
    importance = importance if importance is None else importance.detach().float().contiguous()
    scale = torch.empty(rows, -(-columns // group))
    zero = torch.empty_like(scale)
    addresses = [0 if t is None else t.data_ptr() for t in (w, ratios, importance, scale, zero)]
    sizes = (rows, columns, group, len(ratios), qmax)
    C.fit_affine(*addresses, *sizes, norm, symmetric, SCALE_TYPES[scale_dtype], threads())
    return scale, zero


def _check_fit(
    w: Tensor,
    group: int,
    qmax: int,
    ratios: Tensor,
    importance: Tensor | None,
    scale_dtype: torch.dtype,
    norm: float,
) -> tuple[int, int]:
    require(w.ndim == 2 and w.dtype == torch.float32, f"fit_affine needs w float32[R, C]; got {shape(w)}")
    require(w.shape[1] > 0, f"fit_affine needs at least one column; got {shape(w)}")
    require(group == -1 or group > 0, f"group {group} is not possible; give a positive number of columns, or -1")
    require(1 <= qmax <= 255, f"qmax {qmax} is not possible; allowed: 1 to 255")
    require(
        ratios.ndim == 2 and ratios.shape[1] == 2 and len(ratios) > 0, f"ratios must be [K, 2]; got {shape(ratios)}"
    )
    require(
        importance is None or importance.shape == w.shape[1:],
        f"importance must have one value per column of {shape(w)}; got {shape(importance)}",
    )
    require(scale_dtype in SCALE_TYPES, f"scale dtype {scale_dtype} is unknown; allowed: float32, float16, bfloat16")
    require(norm > 0, f"norm {norm} is not possible; give a positive number")
    return w.shape[0], w.shape[1]


def sweep_block_(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, segment: Tensor, qmax: int
) -> tuple[Tensor, Tensor]:
    """GPTQ's inner block: quantize columns in order, feeding each error into those that follow (arXiv 2210.17323, 3.3).

    ``w`` float32 ``[R, B]``, changed in place: afterwards column ``j`` holds the compensated value that was quantized.
    ``u [B, B]`` is the block of the upper Cholesky factor of the inverse Hessian. Column ``j`` uses
    ``scale[:, segment[j]]`` and ``zero[:, segment[j]]`` (``[R, S]``; ``segment`` int32 ``[B]``). Returns ``codes``
    uint8 ``[R, B]`` and ``err [R, B]`` with ``err[:, j] = (w_j - q_j) / u[j, j]``, of the dtype of ``w``. ``w`` and
    ``u`` may be slices of a larger matrix. float64, and blocks over 256 columns, run the reference.
    Raises RequestError on wrong shapes, dtypes or ranges.
    """
    _check_sweep(w, u, scale, zero, segment, qmax)
    block = w.shape[1]
    too_wide = max(block, scale.shape[1]) > MAX_BLOCK
    if not native(w, u, scale, zero, segment) or w.dtype != torch.float32 or too_wide:
        return reference.sweep_block_(w, u, scale, zero, segment, qmax)
    if block > 1 and w.stride(1) != 1:
        compact = w.clone(memory_format=torch.contiguous_format)
        result = sweep_block_(compact, u, scale, zero, segment, qmax)
        w.copy_(compact)
        return result
    codes, err, _ = _sweep(w, u, scale, zero, segment, qmax, None)
    return codes, err


def sweep_kept_(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, segment: Tensor, qmax: int, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sweep_block_` for zero points that are no integers (codes are ``round(w / scale + zero)``), and with
    weights kept beside the codes (SpQR, arXiv 2306.03078, algorithm 1).

    Where ``((w_j - q_j) / u[j, j])² > limit``, ``kept`` float16 ``[R, B]`` is ``w_j - q_j``, else 0; ``err`` is that of
    ``q + kept``. Returns ``codes``, ``err``, ``kept``.
    """
    _check_sweep(w, u, scale, zero, segment, qmax)
    too_wide = max(w.shape[1], scale.shape[1]) > MAX_BLOCK
    usable = native(w, u, scale, zero, segment) and w.dtype == torch.float32 and w.stride(-1) == 1
    if not usable or too_wide:
        return reference.sweep_kept_(w, u, scale, zero, segment, qmax, limit)
    codes, err, kept = _sweep(w, u, scale, zero, segment, qmax, limit)
    return codes, err, kept.half()


def _sweep(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, segment: Tensor, qmax: int, limit: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, errors, and what is kept above ``limit``: float32, empty where nothing is to be."""
    u, scale, zero, segment = (t.contiguous() for t in (u, scale, zero, segment))
    codes, err = torch.empty(w.shape, dtype=torch.uint8), torch.empty(w.shape)
    kept = torch.empty(0 if limit is None else w.shape)
    addresses = [t.data_ptr() for t in (w, u, scale, zero, segment, codes, err)]
    sizes = len(w), w.shape[1], scale.shape[1], w.stride(0), u.stride(0), qmax
    C.sweep_block(*addresses, 0 if limit is None else kept.data_ptr(), *sizes, limit or 0.0, threads())
    return codes, err, kept


def _check_sweep(w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, segment: Tensor, qmax: int) -> None:
    same = all(t.dtype == w.dtype and t.device == w.device for t in (u, scale, zero)) and segment.device == w.device
    require(
        w.ndim == 2 and w.dtype in (torch.float32, torch.float64), f"sweep_block_ needs w float32[R, B]; got {shape(w)}"
    )
    rows, block = w.shape
    require(
        same and u.shape == (block, block), f"u must be [B, B] of the dtype and device of {shape(w)}; got {shape(u)}"
    )
    require(
        scale.ndim == 2 and len(scale) == rows and zero.shape == scale.shape,
        f"scale and zero must be [R, S] for w {shape(w)}; got {shape(scale)} and {shape(zero)}",
    )
    require(1 <= qmax <= 255, f"qmax {qmax} is not possible; allowed: 1 to 255")
    require(
        segment.shape == (block,) and segment.dtype == torch.int32,
        f"segment must be int32[{block}]; got {shape(segment)}",
    )
    within = block == 0 or (int(segment.min()) >= 0 and int(segment.max()) < scale.shape[1])
    require(within, f"segment must lie in 0..{scale.shape[1] - 1}; got {segment.tolist()[:8]}...")
