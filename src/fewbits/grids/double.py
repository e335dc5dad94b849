"""Double quantization (arXiv 2305.14314, section 3): the absolute maxima of blocks, themselves in 8 bits.

``A ≈ map[code] * nested + offset``: the mean is taken off, then blocks of 256 share a float32 ``nested`` absolute
maximum, and codes point into the dynamic map. 32 bits per maximum become 8 + 32/256.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fewbits.grids.base import Params
from fewbits.grids.codebook import Codebook, dynamic
from fewbits.kernels import one_thread

BLOCK = 256
_LATTICE = 65535


def compress(absmax: Tensor) -> Params:
    """``absmax`` float32, any shape, as ``absmax`` uint8 of that shape, ``nested`` float32 ``[ceil(N / 256)]`` and
    ``offset`` float32 ``[1]``.
    """
    flat = absmax.reshape(-1)
    with one_thread():
        offset = flat.mean()
    blocks = torch.nn.functional.pad(flat - offset, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    nested = blocks.abs().amax(1, keepdim=True)
    codes = torch.where(nested > 0, _nearest(blocks * (1 / nested)), 0)
    return {
        "absmax": codes.reshape(-1)[: len(flat)].to(torch.uint8).reshape(absmax.shape),
        "nested": nested.reshape(-1),
        "offset": offset.reshape(1),
    }


def expand(p: Params) -> Tensor:
    """The maxima that :func:`compress` stored, float32 in their shape."""
    codes = p["absmax"].reshape(-1)
    nested = p["nested"].repeat_interleave(BLOCK)[: len(codes)]
    return (dynamic_map().lookup(codes) * nested + p["offset"]).reshape(p["absmax"].shape)


@lru_cache
def dynamic_map() -> Codebook:
    """The map of 256 values."""
    return Codebook.of(dynamic())


@lru_cache
def _lattice() -> Tensor:
    """Codes of 65536 equally spaced numbers from -1 to 1."""
    return dynamic_map().nearest(-1 + 2 * torch.arange(_LATTICE + 1, dtype=torch.float32) / _LATTICE)


def _nearest(x: Tensor) -> Tensor:
    """Codes of ``x`` in -1..1 by way of the lattice, as bitsandbytes' CPU code does: near a threshold the result may
    be the second nearest.
    """
    at = (torch.nan_to_num(x).clamp(-1, 1) + 1) * 0.5 * _LATTICE + 0.5
    return _lattice().to(x.device)[at.int()]
