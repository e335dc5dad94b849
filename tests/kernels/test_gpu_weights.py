"""The layouts that GPUs read, and the specification of the products: hand-computed words, and independent decoders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fewbits.errors import RequestError
from fewbits.grids import Bilevel
from fewbits.kernels import gpu, qlinear, words

MASK = 0xFFFFFFFF


def numbers(packed: torch.Tensor) -> list[str]:
    return [f"{int(v) & MASK:08x}" for v in packed.flatten()]


def test_four_bits_are_eight_to_a_word_the_first_lowest() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert numbers(words.pack(codes, 4)) == ["76543210", "fedcba98", "00000000", "00000000"]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
    # low bits 0 1 2 3 0 1 2 3 -> 0b11100100 twice; high bits 0 0 0 0 1 1 1 1
    assert numbers(words.pack(codes, 3)) == ["0000e4e4", "00000000", "000000f0"]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 100])
def test_every_width_comes_back(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    packed = words.pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, -(-columns // 32) * bits)
    assert torch.equal(words.unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 8, 20])
def test_integers_decode_as_on_the_cpu(group: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (6, 50), dtype=torch.uint8)
    groups = 1 if group == -1 else -(-50 // group)
    scale, zero = torch.rand(6, groups).half(), torch.randint(0, 16, (6, groups), dtype=torch.uint8)
    zero = torch.full_like(zero, 8) if symmetric else zero
    g_idx = None if group == -1 else (torch.arange(50) // group)[torch.randperm(50)].int()
    w = gpu.pack_int(codes, scale, None if symmetric else zero, 4, group, g_idx)
    assert torch.equal(w.dense(), qlinear.reference_dense(codes, scale, zero, group, g_idx))
    back = w.unpack()
    assert torch.equal(back[0], codes) and torch.equal(back[1], scale)
    assert (back[3] is None) if g_idx is None else torch.equal(back[3], g_idx)


def test_blocks_of_a_table_run_on_from_row_to_row() -> None:
    table, codes = torch.linspace(-1, 1, 16), torch.arange(15, dtype=torch.uint8).view(3, 5)
    absmax = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    flat = table[codes.long()].view(-1) * absmax.repeat_interleave(4)[:15]
    assert torch.equal(gpu.pack_table(codes, absmax, table, 4).dense(), flat.view(3, 5))
    by_row = gpu.pack_table(codes, torch.tensor([[1.0, 2], [3, 4], [5, 6]]), table, 4, by_row=True)
    want = table[codes.long()] * torch.tensor([[1.0, 1, 1, 1, 2], [3, 3, 3, 3, 4], [5, 5, 5, 5, 6]])
    assert torch.equal(by_row.dense(), want)


def test_doubly_quantized_blocks() -> None:
    codes, table = torch.zeros(300, 4, dtype=torch.uint8), torch.ones(16)
    maps, outer, offset = torch.arange(256.0), torch.tensor([2.0, 3.0]), torch.tensor([0.5])
    absmax = (torch.arange(300) % 256).to(torch.uint8)
    dense = gpu.pack_table(codes, absmax, table, 4, nested=(maps, outer, offset)).dense()
    assert dense[7, 0] == 7 * 2 + 0.5 and dense[255, 3] == 255 * 2 + 0.5 and dense[256 + 5, 1] == 5 * 3 + 0.5


def test_tables_of_every_row() -> None:
    table, codes = torch.arange(24).view(3, 8).half(), torch.tensor([[0, 7], [1, 6], [2, 5]], dtype=torch.uint8)
    assert gpu.pack_levels(codes, table).dense().tolist() == [[0, 7], [9, 14], [18, 21]]


def test_nested_scales_are_those_of_the_grid() -> None:
    w, grid = torch.randn(20, 40), Bilevel(3, 16)
    p = grid.fit(w)
    codes = grid.encode(w, p)
    ranges = [p[name] for name in ("scale_base", "scale_step", "zero_base", "zero_step")]
    packed = gpu.pack_nested(codes, p["scale_code"], p["zero_code"], ranges, 3, 16, grid.rows)
    assert torch.equal(packed.dense(), grid.decode(codes, p))


@pytest.mark.parametrize("scale", [(1, 1), (6, 1), (2, 3)], ids=str)
def test_the_shape_of_a_scale_says_who_shares_it(scale: tuple[int, int]) -> None:
    codes, s = torch.randn(6, 10).to(gpu.E4M3), torch.rand(scale)
    block = (4, 4) if scale == (2, 3) else None
    rows, columns = (4, 4) if block else (6 // scale[0], 10)
    want = codes.float() * s.repeat_interleave(rows, 0)[:6].repeat_interleave(columns, 1)[:, :10]
    assert torch.equal(gpu.pack_bytes(codes, s, block).dense(), want)


def test_integer_products_are_exact_beyond_float32() -> None:
    x, codes = torch.full((2, 4001), 127, dtype=torch.int8), torch.full((3, 4001), 127, dtype=torch.int8)
    codes[0, 0] = 126
    y = gpu.scaled_linear(x, torch.ones(2, 1), gpu.pack_bytes(codes, torch.ones(3, 1)), dtype=torch.float32)
    assert y[0].tolist() == [float(torch.tensor(v, dtype=torch.float32)) for v in (64532129 - 127, 64532129, 64532129)]


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    for dtype in (torch.int8, gpu.E4M3):
        codes, scale = gpu.quantize_rows(x, dtype)
        assert scale[0] == 1 and codes[0].float().tolist() == [0, 0]
        assert scale[2:].isnan().all() and codes.dtype == dtype
    assert gpu.quantize_rows(x[1:2], torch.int8)[0].tolist() == [[64, -127]]  # 63.5 is a tie


def test_linear_is_the_dense_product() -> None:
    codes, x, bias = torch.randint(0, 16, (6, 40), dtype=torch.uint8), torch.randn(2, 3, 40), torch.randn(6)
    w = gpu.pack_int(codes, torch.rand(6, 2), None, 4, 20)
    torch.testing.assert_close(gpu.linear(x, w, bias), F.linear(x, w.dense(), bias))
    assert gpu.linear(x.half(), w, bias).dtype == torch.float16


ZEROS, ONES, HALVES = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1), torch.ones(4, 4).half()
INT = gpu.pack_int(ZEROS, ONES, None, 4, -1)
BYTE = gpu.pack_bytes(ZEROS.view(torch.int8), ONES)
WRONG = {
    "9 bits": lambda: gpu.pack_int(ZEROS, ONES, None, 9, -1),
    "scales of another shape": lambda: gpu.pack_int(ZEROS, ONES, None, 4, 4),
    "a short table": lambda: gpu.pack_table(ZEROS, ONES, torch.ones(15), 8),
    "too few blocks": lambda: gpu.pack_table(ZEROS, ONES, torch.ones(16), 4),
    "uint8 absmax alone": lambda: gpu.pack_table(ZEROS, ONES.to(torch.uint8), torch.ones(16), 8),
    "bytes of uint8": lambda: gpu.pack_bytes(ZEROS, ONES),
    "a scale per nothing": lambda: gpu.pack_bytes(ZEROS.view(torch.int8), torch.ones(3, 1)),
    "codes beyond a row's table": lambda: gpu.pack_levels(ZEROS + 4, HALVES),
    "tables of other rows": lambda: gpu.pack_levels(ZEROS, HALVES[:3]),
    "tables of 5 values": lambda: gpu.pack_levels(ZEROS, torch.ones(4, 5).half()),
    "nested codes of 5 bits": lambda: gpu.pack_nested(
        ZEROS, ZEROS[:, :1] + 16, ZEROS[:, :1], [HALVES[:1, :1]] * 4, 3, 8, 4
    ),
    "ranges of float32": lambda: gpu.pack_nested(ZEROS, ZEROS[:, :1], ZEROS[:, :1], [ONES[:1]] * 4, 3, 8, 4),
    "x too narrow": lambda: gpu.linear(torch.ones(1, 7), INT),
    "x of integers": lambda: gpu.linear(torch.ones(1, 8, dtype=torch.int32), INT),
    "bias too short": lambda: gpu.linear(torch.ones(1, 8), INT, torch.ones(3)),
    "another device": lambda: gpu.linear(torch.ones(1, 8, device="meta"), INT),
    "fp8 x, int8 weight": lambda: gpu.scaled_linear(torch.ones(1, 8).to(gpu.E4M3), torch.ones(1), BYTE),
    "scales of other rows": lambda: gpu.scaled_linear(torch.ones(3, 8).to(torch.int8), torch.ones(2, 1), BYTE),
    "rows to int32": lambda: gpu.quantize_rows(torch.ones(1, 8), torch.int32),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_say_so_in_one_line(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        WRONG[name]()
    assert "\n" not in str(caught.value)
