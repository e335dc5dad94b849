"""Codes of a weight that is zero in many places, as our layout stores them: where the others are, and these alone.

``<module>.mask`` int32 ``[out, ceil(in/32)]``: a bit for each weight, 1 where it is not zero, least significant first;
``<module>.filled`` int32: the codes there as one bitstream over all rows. Everywhere else is the grid's code of zero.
2:4 takes no less: two of four places are four bits too, or three in a code that no processor reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbits.errors import CheckpointError
from fewbits.formats import bitpack, common
from fewbits.formats.base import Layout
from fewbits.grids import Grid, Params

SUFFIXES = frozenset({"mask", "filled"})


def stored_by(layout: Layout) -> bool:
    """Whether a layout stores pruned weights so; others store zeros as codes like any other."""
    return layout.suffixes >= SUFFIXES


def pack(name: str, codes: Tensor, zeros: Tensor, bits: int) -> dict[str, Tensor] | None:
    """``codes [out, in]`` where ``zeros`` is false; None where all codes together take no more."""
    if float(zeros.sum()) * bits <= zeros.numel():
        return None
    filled = bitpack.pack(codes[~zeros], bits)
    return {f"{name}.mask": bitpack.pack((~zeros).to(torch.uint8), 1), f"{name}.filled": filled}


def unpack(
    name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], bits: int, grid: Grid, params: Params
) -> Tensor:
    """The codes; ``tensors`` by suffix. Raises CheckpointError for anything that :func:`pack` cannot have made."""
    packed = common.tensor(name, tensors, "mask", (torch.int32,), (shape[0], bitpack.words(shape[1], 1)))
    mask = bitpack.unpack(packed, 1, shape[1]).bool()
    count = int(mask.sum())
    words = common.tensor(name, tensors, "filled", (torch.int32,), None)
    if tuple(words.shape) != (bitpack.words(count, bits),):
        raise CheckpointError(
            f"tensor {name}.filled has the shape {list(words.shape)}; {count} codes of {bits} bits, as many as "
            f"{name}.mask says, take {bitpack.words(count, bits)} words; one of them is damaged"
        )
    codes = grid.encode(torch.zeros(shape), params)
    codes[mask] = bitpack.unpack(words, bits, count).to(codes.dtype)
    return codes
