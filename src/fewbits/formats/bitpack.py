"""Bit packing: codes of ``b`` bits as one continuous little-endian bitstream in int32 words.

Element ``j`` of a row occupies the bits ``b*j .. b*j + b - 1`` of the row's stream, least significant first. This one
rule is GPTQ's packing for 2, 3, 4 and 8 bits and compressed-tensors' dense packing for every width; AWQ applies a
permutation first.
Words are bit patterns: ``0x88888888`` reads as -2004318072. The host must be little-endian, as every host of torch is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Nibble i of an AWQ word holds output column 8*c + AWQ_ORDER[i] (AutoAWQ "gemm").
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_INVERSE = tuple(AWQ_ORDER.index(i) for i in range(8))


def words(count: int, bits: int) -> int:
    """int32 words that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 32)


def whole(bits: int) -> int:
    """Smallest number of codes that fill whole words: 8 for 4 bits, 32 for 3 bits."""
    return 32 // math.gcd(bits, 32)


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack ``codes`` along ``dim``; higher bits of a code are dropped, unused bits of the last word are 0.

    ``codes`` is any integer dtype, ``bits`` 1 to 8, or 16 for codes int16; the result is contiguous int32,
    ``words(n, bits)`` along ``dim``.
    """
    rows = codes.movedim(dim, -1)
    n = rows.shape[-1]
    if bits == 16:
        even = torch.nn.functional.pad(rows.to(torch.int16), (0, n % 2)).contiguous()
        return even.view(torch.int32).movedim(-1, dim).contiguous()
    blocks = -(-n // 8)
    stream = torch.zeros(*rows.shape[:-1], blocks, dtype=torch.int64, device=codes.device)
    for j in range(min(8, n)):  # 8 codes are `bits` bytes: the pattern repeats
        part = rows[..., j::8].to(torch.int64, copy=True).bitwise_and_(2**bits - 1)
        stream[..., : part.shape[-1]].bitwise_or_(part.bitwise_left_shift_(bits * j))
    pieces = stream.view(torch.uint8).reshape(*stream.shape, 8)[..., :bits].reshape(*rows.shape[:-1], blocks * bits)
    length = 4 * words(n, bits)
    if pieces.shape[-1] < length:
        pieces = torch.nn.functional.pad(pieces, (0, length - pieces.shape[-1]))
    packed = pieces[..., :length].reshape(-1).contiguous().view(torch.int32).view(*rows.shape[:-1], length // 4)
    return packed.movedim(-1, dim).contiguous()


def unpack(packed: Tensor, bits: int, count: int, dim: int = -1) -> Tensor:
    """The first ``count`` codes along ``dim`` as contiguous uint8, int16 for 16 bits; the inverse of :func:`pack`."""
    rows = packed.movedim(dim, -1).contiguous()
    if bits == 16:
        return rows.view(torch.int16)[..., :count].movedim(-1, dim).contiguous()
    blocks = -(-count // 8)
    pieces = rows.view(torch.uint8)
    if pieces.shape[-1] < blocks * bits:
        pieces = torch.nn.functional.pad(pieces, (0, blocks * bits - pieces.shape[-1]))
    pieces = pieces[..., : blocks * bits].reshape(*rows.shape[:-1], blocks, bits)
    stream = torch.nn.functional.pad(pieces, (0, 8 - bits)).contiguous().view(torch.int64).squeeze(-1)
    codes = torch.empty(*rows.shape[:-1], blocks, 8, dtype=torch.uint8, device=packed.device)
    for j in range(8):
        codes[..., j] = (stream >> (bits * j)).bitwise_and_(2**bits - 1)
    return codes.reshape(*rows.shape[:-1], blocks * 8)[..., :count].movedim(-1, dim).contiguous()


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """The bitstream of each row of ``codes [rows, n]`` as uint8 ``[rows, n*bits/8]``; ``n * bits`` a multiple of 8."""
    return pack(codes, bits).view(torch.uint8)[:, : codes.shape[1] * bits // 8].contiguous()


def from_bytes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`to_bytes`: uint8 ``[rows, n]``."""
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)
    return unpack(words, bits, packed.shape[1] * 8 // bits)


def pack_awq(codes: Tensor) -> Tensor:
    """4-bit ``codes [rows, n]`` with ``n % 8 == 0`` as AWQ words int32 ``[rows, n/8]``. Codes 0..7 give 0x75316420."""
    return pack(codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER].reshape(codes.shape), 4)


def unpack_awq(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_awq`: uint8 ``[rows, n]``."""
    codes = unpack(packed, 4, 8 * packed.shape[1])
    return codes.reshape(len(codes), -1, 8)[..., _AWQ_INVERSE].reshape(codes.shape)


def shift_words(packed: Tensor, bits: int, by: int) -> Tensor:
    """Add ``by`` to every code (``bits`` 2, 4 or 8) by adding words, carries included, as GPTQ's readers do."""
    ones = sum(1 << j for j in range(0, 32, bits))
    total = packed.to(torch.int64) + by * ones
    return total.bitwise_and_(0xFFFFFFFF).to(torch.uint32).view(torch.int32)
