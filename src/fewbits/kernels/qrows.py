"""Weight-only linear layers with a table for each row (SqueezeLLM): ``y = x @ table[row, code].T + bias``.

Tables have at most 16 values, and codes are kept as 4 bits (3-bit ones too: 10 of them fill a word, but then each must
be moved on its own). The packed weight is one of ``qlinear``: its ``matmul``, ``dequantize`` and ``stack`` take it; its
``scale`` holds the tables, float16 ``[blocks, 16 rows, 16]``.

With AVX2, up to 4 rows of 16-bit ``x`` become fixed-point numbers of 15 bits that share a power of two over 128
columns, and tables numbers of 16 bits, as in ``qtable``; float32 ``x``, and outliers that need more bits, are
multiplied as floats: up to 2 rows by values whose bytes are looked up for 32 codes at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.kernels import qlinear
from fewbits.kernels._table import require, shape

KIND = 21
"""What C++ calls a weight with a table for each row."""


def pack_rows(codes: Tensor, table: Tensor) -> qlinear.PackedWeight:
    """Pack ``codes`` uint8 ``[out, in]``, places in ``table`` float16 ``[out, levels]``, up to 16 levels.

    Raises RequestError on wrong shapes, codes beyond the table, and without C++ kernels.
    """
    require(qlinear.available(), "the C++ kernels are not available; build them with `pip install .`, or use torch")
    out, levels = len(codes), table.shape[-1]
    require(
        table.dtype == torch.float16 and table.shape == (out, levels) and 1 <= levels <= 16,
        f"{out} rows need tables float16 [{out}, 1 to 16]; got {shape(table)}",
    )
    if codes.numel() and int(codes.max()) >= levels:
        raise RequestError(f"code {int(codes.max())} is beyond the tables of {levels} values")
    whole = F.pad(table.cpu(), (0, 16 - levels, 0, -out % qlinear.ROWS)).view(-1, qlinear.ROWS, 16).contiguous()
    nothing = torch.empty(len(whole), 0, qlinear.ROWS, dtype=torch.uint8)
    return qlinear.pack(KIND, codes, codes.shape[1], whole, nothing, None)


def reference_dense(codes: Tensor, table: Tensor) -> Tensor:
    """The weight that :func:`pack_rows`'s arguments stand for, float32 ``[out, in]``: the specification."""
    return table.float().gather(1, codes.long())
