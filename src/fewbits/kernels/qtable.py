"""Weight-only linear layers on grids that are tables: NF4, FP4, FP6, FP8: ``y = x @ (scale * table[code]).T + bias``.

Up to 16 values (NF4, bitsandbytes' FP4, E2M1 with MX or NVFP4 scales) are kept as 4 bits and looked up in float32;
larger tables must consist of numbers that E4M3 or E5M2 has, and are kept as these. The packed weight is one of
``qlinear``: its ``matmul``, ``dequantize`` and ``stack`` take it.

With AVX2 up to 4 rows of ``x`` become fixed-point numbers of 15 bits that share a power of two over at most 128 columns
(see ``qlinear``), and products are exact integers inside a group:

- Tables of few whole steps (E2M1 is 0..12 halves, ternary) are bytes. Where 15 bits lose more than half of the rounding
  of x's dtype, 16 more are multiplied too; for float32 that is always. The sums are exact but for the rounding of x.
- Other tables (NF4, FP4 of bitsandbytes) are rounded to 16 bits: a weight is off by at most ``2**-16`` of the largest
  value, a result by ``2**-16 * sum(scale * |x|)``. This serves 16-bit x, whose own rounding is ``2**-9`` or ``2**-11``;
  float32, and x with outliers that need more bits, are multiplied by float32 values.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.kernels import qlinear

TABLE, E4M3, E5M2 = 20, 40, 41
FP8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def pack_table(
    codes: Tensor, scale: Tensor, table: Tensor, group: int, g_idx: Tensor | None = None
) -> qlinear.PackedWeight:
    """Pack ``codes`` uint8 ``[out, in]``, places in ``table`` float32 ``[levels]``, with ``scale`` ``[out, groups]``.

    ``group`` -1 means the whole row; the last group may be short; ``g_idx`` int ``[in]`` when groups are not
    consecutive. A scale per tensor or block is expanded by the caller. Raises RequestError on wrong shapes, codes
    beyond the table or of values that are not finite, tables that the kernels cannot hold, and without C++ kernels.
    """
    group = codes.shape[1] if group == -1 else min(group, codes.shape[1])
    qlinear.check_params(codes.shape, group, scale=scale)
    qlinear.check_dtype(scale)
    table, codes = table.detach().float().cpu(), codes.to("cpu", torch.uint8)
    _check_codes(codes, table)
    kind, lut = _storage(tuple(table.tolist()))
    if lut is not None:
        codes = lut[codes.long()]
    values = torch.nn.functional.pad(table, (0, 16 - len(table))) if kind == TABLE else None
    blocks = qlinear.by_block(scale)
    nothing = torch.empty(len(blocks), 0, qlinear.ROWS, dtype=torch.uint8)
    return qlinear.pack(kind, codes, group, blocks, nothing, g_idx, values)


def reference_dense(codes: Tensor, scale: Tensor, table: Tensor, group: int, g_idx: Tensor | None = None) -> Tensor:
    """The weight that :func:`pack_table`'s arguments stand for, float32 ``[out, in]``: the specification."""
    columns = codes.shape[1]
    index = g_idx.long() if g_idx is not None else torch.arange(columns) // (columns if group == -1 else group)
    return table.float()[codes.long()] * scale.float().index_select(1, index)


def fp8_table(kind: int) -> Tensor:
    """The values of all 256 codes, float32; NaN and infinities as the format has them."""
    return torch.arange(256, dtype=torch.uint8).view(FP8[kind]).float()


def _check_codes(codes: Tensor, table: Tensor) -> None:
    used = torch.bincount(codes.flatten(), minlength=256)
    beyond = used[len(table) :].nonzero()
    if len(beyond):
        raise RequestError(f"code {len(table) + int(beyond[0])} is beyond the table of {len(table)} values")
    wrong = ((used[: len(table)] > 0) & ~table.isfinite()).nonzero()
    if len(wrong):
        code = int(wrong[0])
        raise RequestError(f"the weight holds {table[code].item()} (code {code}); only finite weights can be packed")


@cache
def _storage(values: tuple[float, ...]) -> tuple[int, Tensor | None]:
    """How the kernels keep codes of a table: the kind, and the kernels' code of each (None: the same)."""
    table = torch.tensor(values)
    if len(values) <= 16:
        return TABLE, None
    for kind, dtype in FP8.items():
        eights = table.nan_to_num(0, 0, 0).to(dtype)
        if torch.equal(eights.float(), table.nan_to_num(0, 0, 0)):
            lut = eights.view(torch.uint8)
            return kind, None if torch.equal(lut[table.isfinite()], torch.arange(len(table))[table.isfinite()]) else lut
    raise RequestError(
        f"a table of {len(values)} values cannot be packed; allowed: 16 values, or numbers that E4M3 or E5M2 have"
    )
