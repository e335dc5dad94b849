"""Codes of 2 to 8 bits in 32-bit words along a row, without a wasted bit: the layout that GPU kernels read.

A code is cut into *planes* whose widths divide 32: 3 bits are a plane of the 2 low bits and one of the high bit. In a
plane of width ``p`` word ``i`` holds columns ``i*32/p ..``, the first in the lowest bits. A row is padded to a multiple
of 32 columns (with code 0) and stores its planes one after the other: it takes ``ceil(in/32) * bits`` words, and plane
``p`` begins at word ``ceil(in/32) * (bits of the planes before it)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[out, in]`` to int32 ``[out, ceil(in/32) * bits]``."""
    out, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % 32))
    packed, below = [], 0
    for width in PLANES[bits]:
        part = (padded >> below) & (2**width - 1)
        per_byte, below = 8 // width, below + width
        fields = part.view(out, -1, per_byte)
        joined = fields[..., 0].clone()
        for j in range(1, per_byte):
            joined |= fields[..., j] << (j * width)
        packed.append(joined.contiguous().view(torch.int32))
    return torch.cat(packed, 1)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes, uint8 ``[out, columns]``."""
    out, blocks = len(words), -(-columns // 32)
    codes, below = torch.zeros(out, blocks * 32, dtype=torch.uint8, device=words.device), 0
    for width in PLANES[bits]:
        part = words[:, blocks * below : blocks * (below + width)].contiguous().view(torch.uint8)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=words.device)
        codes |= ((part[..., None] >> shifts) & (2**width - 1)).view(out, -1) << below
        below += width
    return codes[:, :columns].contiguous()
