"""Bit positions against the constants of the GPTQ, AWQ and compressed-tensors formats."""

from __future__ import annotations

import time

import pytest
import torch

from fewbits.formats import bitpack


def hexes(words: torch.Tensor) -> list[str]:
    return [f"{w & 0xFFFFFFFF:08X}" for w in words.reshape(-1).tolist()]


@pytest.mark.parametrize(
    "bits, codes, expected",
    [
        (4, range(8), ["76543210"]),
        (4, [c + 8 for c in range(-8, 0)], ["76543210"]),  # compressed-tensors codes -8..-1
        (4, [c + 8 for c in range(-4, 4)], ["BA987654"]),
        (2, [0, 1, 2, 3] * 4, ["E4E4E4E4"]),
        (8, range(4), ["03020100"]),
        (3, list(range(8)) * 4, ["88FAC688", "C688FAC6", "FAC688FA"]),
        (2, [1] * 16, ["55555555"]),
        (2, [2] * 16, ["AAAAAAAA"]),
        (3, [3] * 32, ["DB6DB6DB", "B6DB6DB6", "6DB6DB6D"]),
        (3, [4] * 32, ["24924924", "49249249", "92492492"]),
        (4, [7] * 8, ["77777777"]),
        (4, [8] * 8, ["88888888"]),
        (8, [127] * 4, ["7F7F7F7F"]),
        (8, [128] * 4, ["80808080"]),
        (4, [0, 5] + [8] * 6, ["88888850"]),
    ],
)
def test_words(bits: int, codes, expected: list[str]) -> None:
    c = torch.tensor(list(codes), dtype=torch.uint8)
    packed = bitpack.pack(c, bits)
    assert packed.dtype == torch.int32 and hexes(packed) == expected
    assert torch.equal(bitpack.unpack(packed, bits, len(c)), c)


def test_words_are_bit_patterns() -> None:
    assert bitpack.pack(torch.full((8,), 8), 4).item() == -2004318072
    assert bitpack.pack(torch.full((8,), 7), 4).item() == 2004318071
    assert bitpack.pack(torch.full((16,), 2), 2).item() == -1431655766


def test_awq_order() -> None:
    codes = torch.arange(8, dtype=torch.uint8).reshape(1, 8)
    assert hexes(bitpack.pack_awq(codes)) == ["75316420"]
    many = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    assert torch.equal(bitpack.unpack_awq(bitpack.pack_awq(many)), many)
    assert hexes(bitpack.pack_awq(torch.full((1, 8), 8))) == ["88888888"]


def bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """The definition: bit k of code j is bit b*j + k of the stream."""
    stream = sum(c << (bits * j) for j, c in enumerate(codes))
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 33, 100])
def test_every_width_is_the_continuous_stream(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(bits * count)).to(torch.uint8)
    packed = bitpack.pack(codes, bits)
    assert packed.shape == (3, bitpack.words(count, bits))
    assert [[w & 0xFFFFFFFF for w in row] for row in packed.tolist()] == [
        bit_by_bit(row, bits) for row in codes.tolist()
    ]
    assert torch.equal(bitpack.unpack(packed, bits, count), codes)
    down = bitpack.pack(codes.t(), bits, dim=0)
    assert torch.equal(down, packed.t()) and down.is_contiguous()
    assert torch.equal(bitpack.unpack(down, bits, count, dim=0), codes.t())


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_to_the_compressed_tensors_packer(bits: int) -> None:
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for count in (5, 32, 64, 100):
        codes = torch.randint(0, 2**bits, (6, count), dtype=torch.uint8)
        signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(bitpack.pack(codes, bits), theirs.pack_to_int32(signed, bits))
        assert torch.equal(bitpack.pack(codes, bits, dim=0), theirs.pack_to_int32(signed, bits, packed_dim=0))


def test_higher_bits_of_a_code_never_reach_its_neighbours() -> None:
    assert hexes(bitpack.pack(torch.tensor([16, -1, 0, 0, 0, 0, 0, 0]), 4)) == ["000000F0"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_sum_of_words_undoes_a_difference_of_words(bits: int) -> None:
    zeros = torch.randint(0, 2**bits, (4, 64), dtype=torch.uint8)  # zero 0 included: the borrow crosses codes
    v2 = bitpack.pack(zeros, bits)
    v1 = bitpack.shift_words(v2, bits, -1)
    assert torch.equal(bitpack.shift_words(v1, bits, 1), v2)
    assert not torch.equal(v1, v2)
    if bits == 4:
        assert hexes(bitpack.shift_words(bitpack.pack(torch.tensor([0, 5] + [8] * 6), 4), 4, -1)) == ["7777773F"]


def test_ten_million_codes_take_seconds_not_minutes() -> None:
    codes = torch.randint(0, 8, (2500, 4000), dtype=torch.uint8)
    started = time.perf_counter()
    assert torch.equal(bitpack.unpack(bitpack.pack(codes, 3), 3, 4000), codes)
    assert time.perf_counter() - started < 5
