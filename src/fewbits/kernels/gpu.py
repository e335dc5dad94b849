"""Weights as GPUs read them, and the products with them: plain torch is the specification, Triton twins are the speed.

Every weight is ``[out, in]`` with codes that run along ``in``. Five kinds cover what the package quantizes to:

- :class:`IntWeight`, uniform integers of 2 to 8 bits: ``scale * (code - zero)``, parameters ``[out, groups]``;
- :class:`TableWeight`, 4-bit tables (NF4, FP4 of bitsandbytes, E2M1): ``table[code] * absmax``, ``absmax`` per block;
- :class:`ByteWeight`, one byte per weight (int8, FP8 E4M3) with a scale per tensor, row, group or 2-D block;
- :class:`LevelsWeight`, a table for each row (SqueezeLLM): ``table[row, code]``;
- :class:`NestedWeight`, integers whose scales and zero points are codes of up to 4 bits themselves (SpQR).

The layout of packed codes is :mod:`fewbits.kernels.words`. A twin runs where Triton does: on CUDA and ROCm devices, and
on the CPU in Triton's interpreter (``TRITON_INTERPRET=1`` with ``FEWBITS_KERNELS=triton``). Everywhere else the
reference runs, and the first time on a GPU one line in the log says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import triton, words
from fewbits.kernels._table import Choice, register_twin, require, shape, twins
from fewbits.kernels.qlinear import column_order

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn


class Weight(Protocol):
    """What the products need of a weight."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def tensors(self) -> tuple[Tensor | None, ...]: ...

    def dense(self) -> Tensor:
        """float32 ``[out, in]``: the specification."""
        ...


class _Held:
    """What all kinds share: they live where their first tensor lives."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        first = self.tensors[0]
        assert first is not None
        return first.device

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)


@dataclass(frozen=True)
class IntWeight(_Held):
    """``scale[n, g] * (code[n, k] - zero[n, g])``, ``g`` being the group of column ``k``.

    ``codes`` int32 words, ``scale`` float32|float16|bfloat16 and ``zero`` uint8 ``[out, groups]``; no ``zero`` means
    ``2**(bits-1)`` everywhere. ``order`` int32 ``[in]`` is the column of the weight at each packed column, or None.
    """

    bits: int
    shape: tuple[int, int]
    group: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.scale, self.zero, self.order

    def dense(self) -> Tensor:
        packed = words.unpack(self.codes, self.bits, self.shape[1]).float()
        index = torch.arange(self.shape[1], device=packed.device) // self.group
        zero = 2.0 ** (self.bits - 1) if self.zero is None else self.zero.float()[:, index]
        w = (packed - zero) * self.scale.float()[:, index]
        return w if self.order is None else torch.empty_like(w).index_copy_(1, self.order.long(), w)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What :func:`pack_int` was given: codes uint8 ``[out, in]``, scale, zero, and g_idx int32 ``[in]`` or None."""
        packed = words.unpack(self.codes, self.bits, self.shape[1])
        if self.order is None:
            return packed, self.scale, self.zero, None
        order, codes, g_idx = self.order.long(), torch.empty_like(packed), torch.empty_like(self.order)
        codes[:, order] = packed
        g_idx[order] = torch.arange(len(order), device=order.device, dtype=torch.int32) // self.group
        return codes, self.scale, self.zero, g_idx


@dataclass(frozen=True)
class TableWeight(_Held):
    """``table[code] * absmax[block]`` with codes of 4 bits and ``table`` float32 ``[16]``.

    Block of row ``n``, column ``k``: ``(n * pitch + k) // block``. ``pitch == in`` makes the blocks of bitsandbytes,
    which run on from row to row; a multiple of ``block`` starts every row with a new one. ``absmax`` is float32; or
    uint8, and then stands for ``maps[code] * outer[block // 256] + offset`` (double quantization: ``maps`` float32
    ``[256]``, ``outer`` float32, ``offset`` float32 ``[1]``).
    """

    bits: ClassVar[int] = 4

    shape: tuple[int, int]
    block: int
    pitch: int
    codes: Tensor
    absmax: Tensor
    table: Tensor
    maps: Tensor | None = None
    outer: Tensor | None = None
    offset: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.absmax, self.table, self.maps, self.outer, self.offset

    def scales(self) -> Tensor:
        """``absmax`` in float32."""
        if self.maps is None or self.outer is None or self.offset is None:
            return self.absmax
        wide = self.outer.repeat_interleave(256)[: len(self.absmax)]
        return self.maps[self.absmax.long()] * wide + self.offset

    def dense(self) -> Tensor:
        out, columns = self.shape
        codes = words.unpack(self.codes, 4, columns)
        n, k = (torch.arange(size, device=codes.device) for size in (out, columns))
        return self.table[codes.long()] * self.scales()[(n[:, None] * self.pitch + k) // self.block]


@dataclass(frozen=True)
class ByteWeight(_Held):
    """``code * scale``: codes int8 or float8_e4m3fn ``[out, in]``, ``scale`` float32 ``[R, G]``.

    The shape of the scale says who shares it: ``[1, 1]`` the tensor, ``[out, 1]`` a row, otherwise blocks of ``block``
    rows and columns, the last ones ragged.
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.scale

    def dense(self) -> Tensor:
        return self.codes.float() * self.spread()

    def spread(self) -> Tensor:
        """The scale of every weight, float32 ``[out, in]``."""
        n, k = (torch.arange(s, device=self.scale.device) // b for s, b in zip(self.shape, self.block, strict=True))
        return self.scale[n[:, None], k]


@dataclass(frozen=True)
class LevelsWeight(_Held):
    """``table[n, code]`` with ``table`` float16 ``[out, 2**bits]`` and codes of ``bits`` bits, up to 4."""

    bits: int
    shape: tuple[int, int]
    codes: Tensor
    table: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.table

    def dense(self) -> Tensor:
        return self.table.float().gather(1, words.unpack(self.codes, self.bits, self.shape[1]).long())


@dataclass(frozen=True)
class NestedWeight(_Held):
    """``scale[n, g] * (code[n, k] - zero[n, g])``, ``g`` being the group of column ``k``, where ``scale[n, g]`` is
    ``scale_base + scale_step * (nested & 15)`` and ``zero[n, g]`` is ``zero_base + zero_step * (nested >> 4)``.

    ``nested`` uint8 ``[out, groups]``; bases and steps float16 ``[ceil(out / rows), groups]``.
    """

    bits: int
    shape: tuple[int, int]
    group: int
    rows: int
    codes: Tensor
    nested: Tensor
    scale_base: Tensor
    scale_step: Tensor
    zero_base: Tensor
    zero_step: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.nested, self.scale_base, self.scale_step, self.zero_base, self.zero_step

    def dense(self) -> Tensor:
        codes = words.unpack(self.codes, self.bits, self.shape[1]).float()
        scale = self._value(self.scale_base, self.scale_step, self.nested & 15)
        zero = self._value(self.zero_base, self.zero_step, self.nested >> 4)
        index = torch.arange(self.shape[1], device=codes.device) // self.group
        return scale.index_select(1, index) * (codes - zero.index_select(1, index))

    def _value(self, base: Tensor, step: Tensor, code: Tensor) -> Tensor:
        base, step = (t.float().repeat_interleave(self.rows, 0)[: len(code)] for t in (base, step))
        return base + step * code


def pack_int(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, g_idx: Tensor | None = None
) -> IntWeight:
    """Pack ``codes`` uint8 ``[out, in]`` with ``scale`` and ``zero`` ``[out, groups]`` (0..255; None: the middle).

    ``group`` -1 means the whole row; the last group may be short; ``g_idx`` int ``[in]`` when groups are scattered.
    Raises RequestError on wrong shapes.
    """
    out, columns = codes.shape
    group = columns if group == -1 else min(group, columns)
    want = (out, -(-columns // group))
    require(2 <= bits <= 8, f"bits {bits} cannot be packed; allowed: 2 to 8")
    require(scale.dtype in FLOATS, f"scales of {scale.dtype} cannot be packed; allowed: float32, float16, bfloat16")
    for name, p in (("scale", scale), ("zero", zero)):
        require(p is None or p.shape == want, f"{name} is {shape(p)}; {out} rows by groups of {group} need {want}")
    order = None if g_idx is None else column_order(g_idx, group)
    packed = words.pack(codes if order is None else codes[:, order.long()], bits)
    zero = None if zero is None else zero.to(torch.uint8).contiguous()
    return IntWeight(bits, (out, columns), group, packed, scale.contiguous(), zero, order)


def pack_table(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    block: int,
    by_row: bool = False,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
) -> TableWeight:
    """Pack ``codes`` uint8 ``[out, in]`` (0..15) of a 4-bit ``table`` float32 ``[16]`` with one ``absmax`` per block.

    ``by_row`` starts every row with a new block (``absmax [out, blocks]``); otherwise blocks run through the flattened
    weight, as in bitsandbytes. ``nested`` is ``(maps [256], outer, offset [1])`` for uint8 ``absmax``.
    Raises RequestError on wrong shapes.
    """
    out, columns = codes.shape
    pitch = -(-columns // block) * block if by_row else columns
    blocks = -(-out * pitch // block)
    require(table.numel() == 16, f"a 4-bit table has 16 values; got {shape(table)}")
    require(absmax.numel() == blocks, f"absmax is {shape(absmax)}; {blocks} blocks of {block} need one value each")
    wanted = torch.float32 if nested is None else torch.uint8
    require(absmax.dtype == wanted, f"absmax is {shape(absmax)}; allowed: float32, or uint8 with its nested parameters")
    flat, values = absmax.reshape(-1).contiguous(), table.float().contiguous()
    return TableWeight((out, columns), block, pitch, words.pack(codes, 4), flat, values, *(nested or ()))


def pack_bytes(codes: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> ByteWeight:
    """``codes`` int8 or float8_e4m3fn ``[out, in]`` with ``scale [1, 1]``, ``[out, 1]``, or one per ``block`` of
    ``(rows, columns)``. Raises RequestError on wrong shapes."""
    require(codes.dtype in (torch.int8, E4M3), f"codes are {shape(codes)}; allowed: int8, float8_e4m3fn")
    require(scale.ndim == 2, f"scale is {shape(scale)}; it needs two dimensions, [1, 1], [out, 1] or [blocks, blocks]")
    sizes = zip(codes.shape, scale.shape, strict=True)
    rows, columns = block or ((s if count == 1 else 1) for s, count in sizes)
    want = (-(-codes.shape[0] // rows), -(-codes.shape[1] // columns))
    require(tuple(scale.shape) == want, f"scale is {shape(scale)}; blocks of {rows} x {columns} need {want}")
    return ByteWeight(codes.contiguous(), scale.float().contiguous(), (rows, columns))


def pack_levels(codes: Tensor, table: Tensor) -> LevelsWeight:
    """Pack ``codes`` uint8 ``[out, in]``, places in ``table`` float16 ``[out, levels]``, 4, 8 or 16 levels.

    Raises RequestError on wrong shapes and on codes beyond the table.
    """
    out, levels = len(codes), table.shape[-1]
    fits = table.dtype == torch.float16 and table.shape == (out, levels) and levels in (4, 8, 16)
    require(fits, f"{out} rows need tables float16 [{out}, 4 | 8 | 16]; got {shape(table)}")
    most = int(codes.max()) if codes.numel() else 0
    require(most < levels, f"code {most} is beyond the tables of {levels} values")
    bits = levels.bit_length() - 1
    return LevelsWeight(bits, (out, codes.shape[1]), words.pack(codes, bits), table.contiguous())


def pack_nested(
    codes: Tensor, scale_code: Tensor, zero_code: Tensor, ranges: Sequence[Tensor], bits: int, group: int, rows: int
) -> NestedWeight:
    """Pack ``codes`` uint8 ``[out, in]`` of ``bits`` bits with ``scale_code`` and ``zero_code`` uint8
    ``[out, groups]``, at most 15, and ``ranges``: base and step of scales, base and step of zero points, float16
    ``[ceil(out / rows), groups]``. ``group`` -1 means the whole row. Raises RequestError on wrong shapes.
    """
    out, columns = codes.shape
    group = columns if group == -1 else min(group, columns)
    want = (out, -(-columns // group))
    require(2 <= bits <= 8, f"bits {bits} cannot be packed; allowed: 2 to 8")
    for name, p in (("scale_code", scale_code), ("zero_code", zero_code)):
        fits = p.dtype == torch.uint8 and p.shape == want and (not p.numel() or int(p.max()) < 16)
        require(fits, f"{name} is {shape(p)}; {out} rows by groups of {group} need uint8 {want} of at most 15")
    tiles = (-(-out // rows), want[1])
    for p in ranges:
        require(p.dtype == torch.float16 and p.shape == tiles, f"a range is {shape(p)}; allowed: float16 {tiles}")
    base, step, zero_base, zero_step = (p.contiguous() for p in ranges)
    both = (scale_code | (zero_code << 4)).contiguous()
    packed = words.pack(codes, bits)
    return NestedWeight(bits, (out, columns), group, rows, packed, both, base, step, zero_base, zero_step)


register_twin(
    "linear",
    "(x f32|f16|bf16[.., in], int 2..8 bits | 4-bit table | table per row | nested scales | fp8 | int8 "
    "weight[out, in], bias[out]?) -> [.., out]",
    "codes decoded in registers; sums of products for up to 4 rows, tl.dot above",
)
register_twin(
    "scaled_linear",
    "(x i8|f8e4m3[.., in], sx f32[.., 1|groups], i8|f8e4m3 weight[out, in], bias[out]?) -> [.., out]",
    "int8 x int8 -> int32 or fp8 x fp8 -> float32, scales fused into the store",
)
register_twin(
    "quantize_rows",
    "(x f32|f16|bf16[.., in], i8|f8e4m3) -> (codes[.., in], scale f32[.., 1])",
    "one pass per row",
)
register_twin(
    "sparse_matmul",
    "(x f32|f16|bf16[.., in], offsets i32[out+1], columns i32[n], values f16[n]) -> f32[.., out]",
    "one program per row gathers its columns",
)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` in x's dtype, sums in float32. Raises RequestError on wrong shapes."""
    _check(x, weight, bias)
    require(x.dtype in FLOATS, f"x is {shape(x)}; allowed: float32, float16, bfloat16")
    run = twin("product", x)
    if run is None:
        return reference_linear(x, weight, bias)
    return run(rows_of(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def reference_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The specification of :func:`linear`: the float32 product with the dense weight, rounded once."""
    return F.linear(x.float(), weight.dense(), None if bias is None else bias.float()).to(x.dtype)


def scaled_linear(
    x: Tensor, scale: Tensor, weight: ByteWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``(x * scale) @ W.T + bias``, both operands in one byte: int8 (summed in int32) or float8_e4m3fn (in float32).

    ``scale`` float32: one value, ``[.., 1]`` for each row of ``x [.., in]``, or ``[.., groups]`` for as many equal
    groups of columns, then of the weight's block width. Integers take scales per row of the weight only.
    Raises RequestError on wrong shapes or dtypes.
    """
    _check(x, weight, bias)
    require(x.dtype == weight.codes.dtype, f"x is {shape(x)}, the weight {shape(weight.codes)}; give both the same")
    rows = x.numel() // x.shape[-1]
    groups = 1 if scale.numel() == 1 else scale.shape[-1]
    fits = groups == 1 or groups == weight.scale.shape[1]
    require(fits and scale.numel() in (1, rows * groups), f"scale is {shape(scale)}; x {shape(x)} needs one per row")
    whole = weight.scale.shape[1] == 1 and groups == 1
    require(whole or x.dtype == E4M3, f"int8 sums need one scale per row; got {shape(scale)} and {shape(weight.scale)}")
    scale = scale.float().reshape(-1, groups)
    run = twin("scaled", x)
    flat = rows_of(x)
    y = reference_scaled(flat, scale, weight, bias, dtype) if run is None else run(flat, scale, weight, bias, dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def reference_scaled(x: Tensor, scale: Tensor, weight: ByteWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The specification of :func:`scaled_linear`; integer sums are exact (float64 holds them). ``x [rows, in]``."""
    if x.dtype == torch.int8:
        y = (x.double() @ weight.codes.double().T).float() * scale * weight.scale.T
    else:
        y = (x.float() * _by_column(scale, weight)) @ weight.dense().T
    return (y if bias is None else y + bias.float()).to(dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scale ``[.., 1]`` of each row of ``x [.., in]``: ``absmax / 127`` for int8, ``absmax / 448`` for
    float8_e4m3fn, ties to even. Rows of zeros get scale 1; a row that is not finite gets scale NaN."""
    require(dtype in (torch.int8, E4M3), f"rows cannot become {dtype}; allowed: torch.int8, torch.float8_e4m3fn")
    run = twin("quantize_rows", x)
    if run is None:
        return reference_rows(x, dtype)
    codes, scale = run(rows_of(x), dtype)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def reference_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The specification of :func:`quantize_rows`."""
    top, wide = (127.0 if dtype == torch.int8 else 448.0), x.float()
    scale = wide.abs().amax(-1, keepdim=True) / top + (wide * 0).sum(-1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (wide / scale).clamp(-top, top)
    return (torch.nan_to_num(codes).round() if dtype == torch.int8 else codes).to(dtype), scale


def info() -> dict[str, Choice]:
    """For each op of this file: what runs for tensors on a CUDA or ROCm device, and why."""
    why = triton.missing()
    return {
        name: Choice("reference", why) if why else Choice("triton", op.uses("cuda")) for name, op in twins().items()
    }


def twin(name: str, x: Tensor) -> Callable[..., Any] | None:
    """The launcher ``name`` of the Triton package when it can run on x's device, else None."""
    return triton.launcher(name) if triton.usable(x.device) else None


def rows_of(x: Tensor) -> Tensor:
    """``[rows, in]`` with consecutive columns."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _by_column(scale: Tensor, weight: ByteWeight) -> Tensor:
    """Scales ``[rows, groups]`` of x repeated over the columns that share them."""
    if scale.shape[1] == 1:
        return scale
    return scale[:, torch.arange(weight.shape[1], device=scale.device) // weight.block[1]]


def _check(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    out, columns = weight.shape
    require(x.ndim > 0 and x.shape[-1] == columns, f"the input is {shape(x)}; this weight takes {columns} columns")
    require(bias is None or bias.shape == (out,), f"bias is {shape(bias)}; this weight needs [{out}]")
    where = weight.tensors[0]
    same = where is not None and where.device == x.device and (bias is None or bias.device == x.device)
    require(same, f"x {shape(x)}, weight {shape(where)} and bias {shape(bias)} must be on one device")
