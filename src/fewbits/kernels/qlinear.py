"""Weight-only linear layers on integer grids (others: ``qtable``): pack, ``y = x @ (scale * (code - zero)).T + bias``.

Sums are float32 and take the dtype of ``x`` at the end: the result is that of the dense weight up to rounding. Few rows
of ``x`` (decoding) are multiplied by the packed codes directly, which costs one pass over the packed bytes; many rows
(a prompt) by tiles of dequantized columns, through torch's own matrix product.

With AVX2 the few rows become fixed-point numbers that share a power of two over at most 128 columns: of 31 bits, or of
16 where these lose less than half of the rounding of bfloat16 or float16 ``x``, summed over all but the largest column.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.kernels import _table

_C: Any = _table.C
ROWS = 16
_local = threading.local()
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCALES = DTYPES | {torch.uint8: 3}
"""Of scales in the kernels' order; uint8 ones are codes with what they stand for (:func:`pack_nested`)."""
UNITS = {2: 16, 3: 32, 4: 8, 8: 4}
"""Columns of a unit of so many bits, to which groups are filled up."""
FUSED_ROWS = 16
"""Most rows of ``x`` for which the fused product beats dequantizing."""
TILE_BLOCKS = {torch.bfloat16: 128, torch.float32: 32}
"""Blocks dequantized at a time. Narrower than 2048 rows leaves half of the bfloat16 units idle (20 against 12 ms);
float32 gains nothing beyond 512 rows, which stay in the third-level cache."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[out, in]`` in the kernels' order: rows in blocks of 16, one 32-bit lane for each row.

    ``codes`` int32 ``[words]``, ``scale`` float32|float16|bfloat16 and ``zero`` uint8 ``[blocks, groups, 16]``, but
    where :func:`pack_nested` and ``qrows`` say otherwise;
    ``order`` int32 ``[in]``, the column of the weight at each packed column, or None when they are the same; ``kind``
    the meaning of a code for C++ (integers: their bits); ``table`` float32 ``[16]`` when codes are places in it.
    """

    kind: int
    shape: tuple[int, int]
    group: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None
    table: Tensor | None
    handle: Any = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero))

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self.codes, self.scale, self.zero, self.order, self.table)
        return rebuild, (self.kind, self.shape, self.group, *parts)


def available() -> bool:
    """Whether the C++ kernels are built and not switched off by ``FEWBITS_KERNELS=reference``."""
    return _C is not None and hasattr(_C, "QLinear")


_table.register(
    "qlinear",
    "(x f32|f16|bf16[.., in], packed codes 2|3|4|8 bits|table|fp8[out, in], scale, zero, bias f32[out]?) -> [.., out]",
    lambda level: f"{_C.qlinear_isa()} product for up to {FUSED_ROWS} rows, dequantized tiles above",
)


def isa() -> str:
    """The instruction set that the products use on this machine."""
    return _C.qlinear_isa() if available() else "reference"


def column_order(g_idx: Tensor, group: int) -> Tensor | None:
    """int32 ``[in]`` that makes scattered groups consecutive; None when they are so already.

    Raises RequestError when the groups, once sorted, are not all full but the last.
    """
    order = torch.argsort(g_idx.long(), stable=True)
    expected = torch.arange(len(g_idx), device=g_idx.device) // group
    if not torch.equal(g_idx.long()[order], expected):
        raise RequestError(
            f"g_idx does not give every group {group} columns (the last may have fewer); use the dense weight"
        )
    in_order = torch.equal(order, torch.arange(len(g_idx), device=g_idx.device))
    return None if in_order else order.to(torch.int32)


def pack_weight(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, g_idx: Tensor | None = None
) -> PackedWeight:
    """Pack ``codes`` uint8 ``[out, in]`` with ``scale`` and ``zero`` ``[out, groups]`` (0..255) for the CPU kernels.

    ``group`` -1 means the whole row; the last group may be short; ``g_idx`` int ``[in]`` when groups are not
    consecutive. 5, 6 and 7 bits are kept in 8. Raises RequestError on wrong shapes, and without the C++ kernels.
    """
    group = codes.shape[1] if group == -1 else min(group, codes.shape[1])
    if not 2 <= bits <= 8:
        raise RequestError(f"bits {bits} cannot be packed; allowed: 2 to 8")
    check_params(codes.shape, group, scale=scale, zero=zero)
    check_dtype(scale)
    stored = bits if bits in (2, 3, 4, 8) else 8
    return pack(stored, codes, group, by_block(scale), by_block(zero.to(torch.uint8)), g_idx)


def pack_nested(codes: Tensor, scale: Tensor, zero: Tensor, ranges: Tensor, bits: int, group: int) -> PackedWeight:
    """Pack ``codes`` uint8 ``[out, in]`` whose scales and zero points are numbers of few bits themselves (SpQR).

    ``scale`` and ``zero`` uint8 ``[out, groups]``; ``ranges`` float16 ``[ceil(out / 16), groups, 4]``: base and step
    of the scales, then of the zero points, of 16 rows; either is ``base + step * code``. In the kernels' order
    ``scale`` is uint8 ``[blocks, groups, 24]``, the codes of 16 rows and their ranges. Raises RequestError as
    :func:`pack_weight`.
    """
    group = codes.shape[1] if group == -1 else min(group, codes.shape[1])
    if not 2 <= bits <= 8:
        raise RequestError(f"bits {bits} cannot be packed; allowed: 2 to 8")
    check_params(codes.shape, group, scale=scale, zero=zero)
    blocks = (-(-len(codes) // ROWS), scale.shape[1], 4)
    if not scale.dtype == zero.dtype == torch.uint8 or ranges.dtype != torch.float16 or ranges.shape != blocks:
        raise RequestError(
            f"nested scales need uint8 codes and float16 ranges {list(blocks)}; got {scale.dtype}, {zero.dtype} and "
            f"{_table.shape(ranges)}"
        )
    stored = min((b for b in UNITS if bits <= b), key=lambda b: b * -(-group // UNITS[b]) * UNITS[b])
    nested = torch.cat([by_block(scale), ranges.cpu().contiguous().view(torch.uint8)], -1)
    return pack(stored, codes, group, nested, by_block(zero), None)


def check_params(shape: Sequence[int], group: int, **params: Tensor) -> None:
    """Raise RequestError unless the kernels are there and ``params`` have a value for each group of ``shape``."""
    if not available():
        raise RequestError(
            "the C++ kernels are not available; build them with `pip install .`, or use the dense weight"
        )
    out, columns = shape
    for name, p in params.items():
        if tuple(p.shape) != (out, -(-columns // group)):
            expected = (out, -(-columns // group))
            raise RequestError(
                f"{name} has shape {tuple(p.shape)}; {out} rows of {columns} columns by {group} need {expected}"
            )


def check_dtype(scale: Tensor) -> None:
    """Raise RequestError for scales that are no numbers of the kernels."""
    if scale.dtype not in DTYPES:
        raise RequestError(f"scales of {scale.dtype} cannot be packed; allowed: float32, float16, bfloat16")


def pack(
    kind: int,
    codes: Tensor,
    group: int,
    scale: Tensor,
    zero: Tensor,
    g_idx: Tensor | None,
    table: Tensor | None = None,
) -> PackedWeight:
    """``codes`` uint8 ``[out, in]`` in the kernels' order, with params that have it already (:func:`by_block`)."""
    out, columns = codes.shape
    order = None if g_idx is None else column_order(g_idx.cpu(), group)
    packed = torch.empty(_C.qlinear_words(kind, out, columns, group), dtype=torch.int32)
    weight = rebuild(kind, (out, columns), group, packed, scale, zero, order, table)
    codes = codes.to("cpu", torch.uint8).contiguous()
    weight.handle.pack(codes.data_ptr(), torch.get_num_threads())
    return weight


def unpack_codes(p: PackedWeight) -> Tensor:
    """The codes, uint8 ``[out, in]``, in the weight's own column order."""
    codes = torch.empty(p.shape, dtype=torch.uint8)
    p.handle.unpack(codes.data_ptr(), torch.get_num_threads())
    return codes


def unpack_weight(p: PackedWeight) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What :func:`pack_weight` was given: codes, scale and zero ``[out, groups]``, and g_idx int32 ``[in]`` or None."""
    scale, zero = (t.transpose(1, 2).reshape(-1, t.shape[1])[: p.shape[0]].contiguous() for t in (p.scale, p.zero))
    if p.order is None:
        return unpack_codes(p), scale, zero, None
    g_idx = torch.empty_like(p.order)
    g_idx[p.order.long()] = torch.arange(p.shape[1], dtype=torch.int32) // p.group
    return unpack_codes(p), scale, zero, g_idx


def dequantize(p: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """``scale * (code - zero)``, ``[out, in]`` (a transposed view), in float32 and rounded once to ``dtype``."""
    out, columns = p.shape
    wide = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    blocks = -(-out // ROWS)
    buffer = torch.empty(columns, blocks * ROWS, dtype=wide)
    p.handle.dequantize(buffer.data_ptr(), blocks * ROWS, 0, blocks, DTYPES[wide], torch.get_num_threads())
    return buffer[:, :out].t().to(dtype)


def stack(parts: Sequence[PackedWeight]) -> tuple[PackedWeight, list[PackedWeight]] | None:
    """Weights with the same columns as one ``[sum of outs, in]``, and each of them again as a view of it.

    None when they differ in anything but rows, or when rows of one would share a block with rows of another.
    """
    first, outs = parts[0], [p.shape[0] for p in parts]
    if len(parts) == 1:
        return first, [first]
    kinds = {(p.kind, p.shape[1], p.group, p.scale.dtype, p.order is None) for p in parts}
    if len(kinds) > 1 or any(out % ROWS for out in outs[:-1]):
        return None
    if first.order is not None and any(p.order is None or not torch.equal(p.order, first.order) for p in parts):
        return None
    if first.table is not None and any(p.table is None or not torch.equal(p.table, first.table) for p in parts):
        return None
    codes, scale, zero = (torch.cat([getattr(p, n) for p in parts]) for n in ("codes", "scale", "zero"))
    kind, columns, group = first.kind, first.shape[1], first.group
    whole = rebuild(kind, (sum(outs), columns), group, codes, scale, zero, first.order, first.table)
    blocks = [-(-out // ROWS) for out in outs]
    pieces = zip(outs, codes.split([len(p.codes) for p in parts]), scale.split(blocks), zero.split(blocks), strict=True)
    return whole, [rebuild(kind, (out, columns), group, c, s, z, first.order, first.table) for out, c, s, z in pieces]


def matmul(x: Tensor, p: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` in x's dtype: x float32|bfloat16|float16 ``[..., in]`` on CPU, bias float32 ``[out]``."""
    out, columns = p.shape
    if x.shape[-1] != columns:
        raise RequestError(f"the input has {x.shape[-1]} columns; this weight takes {columns}")
    if not x.is_contiguous():
        x = x.contiguous()
    rows = x.numel() // columns
    if rows > FUSED_ROWS:
        return _by_tiles(x.view(rows, columns), p, bias).view(*x.shape[:-1], out)
    y = x.new_empty(*x.shape[:-1], out)
    p.handle.product(
        x.data_ptr(),
        y.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        rows,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y


def reference_dense(codes: Tensor, scale: Tensor, zero: Tensor, group: int, g_idx: Tensor | None = None) -> Tensor:
    """The weight that :func:`pack_weight`'s arguments stand for, float32 ``[out, in]``: the specification."""
    columns = codes.shape[1]
    index = g_idx.long() if g_idx is not None else torch.arange(columns) // (columns if group == -1 else group)
    return (codes.float() - zero.float().index_select(1, index)) * scale.float().index_select(1, index)


def reference_matmul(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ w.T + bias`` in float32 (``w`` float32), rounded once to x's dtype: the specification of :func:`matmul`."""
    return F.linear(x.float(), w, bias).to(x.dtype)


def _by_tiles(x: Tensor, p: PackedWeight, bias: Tensor | None) -> Tensor:
    """Many rows: dequantize 16-row blocks into ``[in, tile]`` and multiply. Tile widths do not depend on threads."""
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 and _table.multiplies_bf16() else torch.float32
    inputs, (out, columns) = x.to(wide), p.shape
    blocks = -(-out // ROWS)
    step = TILE_BLOCKS[wide]
    stride = min(step, blocks) * ROWS + 2 * ROWS  # not a power of two: columns would share cache sets
    tile = _scratch(columns * stride, wide)
    y = x.new_empty(x.shape[0], out, dtype=wide)
    offset = None if bias is None else bias.to(wide)
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        begin, end = first * ROWS, min(last * ROWS, out)
        p.handle.dequantize(tile.data_ptr(), stride, first, last, DTYPES[wide], torch.get_num_threads())
        w = tile.view(columns, stride)[:, : end - begin]
        if offset is None:
            torch.mm(inputs, w, out=y[:, begin:end])
        else:
            torch.addmm(offset[begin:end], inputs, w, out=y[:, begin:end])
    return y.to(x.dtype)


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Memory of this thread for ``count`` values; new pages on every call would cost more than the dequantizing."""
    held: Tensor | None = getattr(_local, "tile", None)
    if held is None or held.numel() < count * dtype.itemsize:
        held = _local.tile = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    return held[: count * dtype.itemsize].view(dtype)


def by_block(p: Tensor) -> Tensor:
    """``[out, groups]`` to ``[blocks, groups, 16]``; rows that fill the last block get zeros."""
    out, groups = p.shape
    padded = F.pad(p.cpu(), (0, 0, 0, -out % ROWS))
    return padded.view(-1, ROWS, groups).transpose(1, 2).contiguous()


def rebuild(
    kind: int,
    shape: tuple[int, int],
    group: int,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    order: Tensor | None,
    table: Tensor | None = None,
) -> PackedWeight:
    """The weight of tensors that have the kernels' order."""
    addresses = tuple(0 if t is None else t.data_ptr() for t in (codes, scale, zero, order, table))
    handle = _C.QLinear(kind, *shape, group, addresses, SCALES[scale.dtype])
    return PackedWeight(kind, shape, group, codes, scale, zero, order, table, handle)
