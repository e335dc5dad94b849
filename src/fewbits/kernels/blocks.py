"""``search_blocks``: scales and codes of GGUF's block types, found as llama.cpp's reference quantizers find them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels._table import C, native, register, require, shape, threads

register(
    "search_blocks",
    "(shape: Shape, w: f32[R,C], importance: f32[C]|None) -> codes u8[R,C], d f16, m f16, scales i8, mins i8",
    lambda level: "baseline vectors" if level == "portable" else "AVX2",
)


@dataclass(frozen=True)
class BlockShape:
    """What the search must know of a type: ggml's ``number``, columns per ``block`` and per ``sub``-block.

    ``sub`` 0: one scale per block. ``m``: an offset per block. ``mins``: an offset per sub-block.
    """

    number: int
    block: int
    sub: int = 0
    m: bool = False
    mins: bool = False


def search_blocks(s: BlockShape, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes uint8 ``[R, C]`` and parameters of ``w`` float32 ``[R, C]``, with ``C`` a multiple of the block.

    ``importance`` float32 ``[C]`` weighs the columns (llama.cpp's importance matrix). Parameters: ``d``, ``m`` float16
    ``[R, C/block]`` (``d`` is uint8, the exponent, for MXFP4), ``scales``, ``mins`` int8 ``[R, C/sub]``. Every sum is
    sequential, so that all CPUs give the bits of the scalar original. Raises RequestError on wrong shapes, and where
    the C++ extension is missing.
    """
    require(
        w.ndim == 2 and w.dtype == torch.float32 and w.shape[1] % s.block == 0,
        f"blocks of {s.block} columns need w float32[R, n * {s.block}]; got {shape(w)}",
    )
    require(
        importance is None or importance.shape == w.shape[1:],
        f"importance must have one value per column of {shape(w)}; got {shape(importance)}",
    )
    rows, columns = w.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    found = {"d": torch.empty(rows, columns // s.block, dtype=torch.float16)}
    if s.m:
        found["m"] = torch.empty_like(found["d"])
    for name in ("scales", "mins")[: (s.sub > 0) + s.mins]:
        found[name] = torch.empty(rows, columns // s.sub, dtype=torch.int8)
    require(native(w, importance), "GGUF's searches need the C++ extension and tensors on the CPU; reinstall fewbits")
    if w.numel():
        w = w.detach().contiguous()
        importance = None if importance is None else importance.detach().float().contiguous()
        given = (w, importance, codes, *(found.get(k) for k in ("d", "m", "scales", "mins")))
        addresses = (0 if t is None else t.data_ptr() for t in given)
        C.search_blocks(*addresses, rows, columns, s.block, s.number, threads())
    return codes, found
