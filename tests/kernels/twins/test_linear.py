"""``x @ W.T`` by the twins against the float32 product with the dense weight, for every kind of weight."""

from __future__ import annotations

import itertools

import pytest
import torch

from fewbits.kernels import gpu, triton
from fewbits.kernels.sparse import reference_sparse_matmul, sparse_matmul
from fewbits.kernels.triton import byte, tune
from fewbits.kernels.triton.product import product, span_of
from fewbits.kernels.triton.sparse import sparse_product
from fewbits.tensor import Sparse

# Largest error over largest result. Weights are rounded to x's dtype before tl.dot.
ERROR = {torch.float32: 3e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
ROWS = (1, 3, 17, 64)
NF4 = torch.tensor([-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]).tolist()
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def ints(
    bits: int, out: int, columns: int, group: int, symmetric: bool = False, scatter: bool = False, kind=torch.float16
) -> gpu.IntWeight:
    torch.manual_seed(bits * 1000 + columns)
    size = columns if group == -1 else group
    groups = -(-columns // size)
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    zero = None if symmetric else torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8)
    g_idx = (torch.arange(columns) // size)[torch.randperm(columns)].int() if scatter else None
    return gpu.pack_int(codes, (torch.rand(out, groups) * 0.01 + 0.001).to(kind), zero, bits, group, g_idx)


def tables(out: int, columns: int, block: int, by_row: bool = False, nested: bool = False) -> gpu.TableWeight:
    torch.manual_seed(columns + block)
    codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8)
    blocks = out * -(-columns // block) if by_row else -(-out * columns // block)
    if not nested:
        return gpu.pack_table(codes, torch.rand(blocks) + 0.1, torch.tensor(NF4), block, by_row)
    parts = (torch.linspace(-1, 1, 256), torch.rand(-(-blocks // 256)) + 0.1, torch.tensor([1.5]))
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    return gpu.pack_table(codes, absmax, torch.tensor(NF4), block, by_row, parts)


def floats(out: int, columns: int, scale: tuple[int, int], block: tuple[int, int] | None = None) -> gpu.ByteWeight:
    torch.manual_seed(columns)
    return gpu.pack_bytes((torch.randn(out, columns) * 50).to(gpu.E4M3), torch.rand(scale) * 0.01 + 0.001, block)


def check(weight: gpu.Weight, rows: int, dtype: torch.dtype = torch.float32, bias: bool = True, **tiles) -> None:
    out, columns = weight.shape
    x = torch.randn(rows, columns).to(dtype)
    b = torch.randn(out).to(dtype) if bias else None
    want = gpu.reference_linear(x.float(), weight, b)
    got = product(x, weight, b, **tiles)
    assert got.dtype == dtype and got.shape == (rows, out)
    assert (got.float() - want).abs().max() <= ERROR[dtype] * want.abs().max()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [3, 17])
def test_integers_of_every_width(bits: int, rows: int) -> None:
    check(ints(bits, 24, 100, 32), rows)


SHAPES = [(40, 576, 128), (24, 1536, 64), (33, 100, 20), (65, 77, 33), (5, 576, -1), (1, 7, 3)]


@pytest.mark.parametrize(("out", "columns", "group"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_integers_of_odd_shapes(out: int, columns: int, group: int, rows: int) -> None:
    check(ints(4, out, columns, group, symmetric=rows % 2 == 0), rows)


@pytest.mark.parametrize(("rows", "dtype"), list(itertools.product(ROWS, (torch.float16, torch.bfloat16))), ids=str)
def test_integers_with_halves(rows: int, dtype: torch.dtype) -> None:
    check(ints(4, 40, 576, 64, kind=dtype), rows, dtype)


@pytest.mark.parametrize("rows", ROWS)
def test_scattered_groups(rows: int) -> None:
    check(ints(4, 24, 100, 32, scatter=True), rows, bias=False)


@pytest.mark.parametrize("split", [2, 4, 8])
def test_columns_in_parts(split: int) -> None:
    check(ints(4, 24, 576, 64), 17, split=split)
    check(ints(4, 24, 576, 64), 17, torch.float16, bias=False, split=split)


@pytest.mark.parametrize("tiles", sorted({t for found in tune.MANY.values() for t in found}, key=str), ids=str)
def test_every_tile_of_many_rows(tiles: tune.Tiles) -> None:
    check(ints(3, 70, 100, 32), 19, tiles=tiles)


@pytest.mark.parametrize("tiles", tune.FEW[4] + tune.FEW[1], ids=str)
def test_every_tile_of_few_rows(tiles: tune.Tiles) -> None:
    check(ints(3, 70, 300, 32), 3, tiles=tiles)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("columns", "block"), [(576, 64), (100, 64), (77, 32)])  # 100 and 77: blocks straddle rows
def test_tables_with_the_blocks_of_bitsandbytes(columns: int, block: int, rows: int) -> None:
    check(tables(24, columns, block), rows)


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize(("by_row", "nested"), [(True, False), (False, True), (True, True)])
def test_tables_by_row_and_doubly_quantized(by_row: bool, nested: bool, rows: int) -> None:
    check(tables(30, 100, 32 if by_row else 4, by_row, nested), rows)


def levels(bits: int, out: int, columns: int) -> gpu.LevelsWeight:
    torch.manual_seed(bits + columns)
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    return gpu.pack_levels(codes, torch.randn(out, 2**bits).half())


def nested(bits: int, out: int, columns: int, group: int, tile: int) -> gpu.NestedWeight:
    torch.manual_seed(bits + columns)
    groups, tiles = -(-columns // (columns if group == -1 else group)), -(-out // tile)
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    nibbles = [torch.randint(0, 16, (out, groups), dtype=torch.uint8) for _ in range(2)]
    ranges = [torch.rand(tiles, groups).half() * top for top in (0.01, 0.002, 3.0, 0.3)]
    return gpu.pack_nested(codes, *nibbles, ranges, bits, group, tile)


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize(("bits", "out", "columns"), [(2, 5, 7), (3, 33, 100), (4, 24, 576)])
def test_tables_of_every_row(bits: int, out: int, columns: int, rows: int) -> None:
    check(levels(bits, out, columns), rows)


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize(("columns", "group", "tile"), [(576, 16, 16), (100, 16, 7), (77, 20, 16), (100, -1, 1)])
def test_nested_scales(columns: int, group: int, tile: int, rows: int) -> None:
    check(nested(3, 40, columns, group, tile), rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_levels_and_nested_scales_with_halves(dtype: torch.dtype) -> None:
    for rows in (1, 17):
        check(levels(3, 24, 100), rows, dtype)
        check(nested(3, 40, 100, 16, 16), rows, dtype)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (3, torch.float32), (17, torch.float32)], ids=str)
def test_single_weights(dtype: torch.dtype, rows: int) -> None:
    """Rows with no entry, one, and more than one step of the kernel takes."""
    torch.manual_seed(rows)
    w = torch.randn(9, 200) * (torch.rand(9, 200) < 0.1)
    w[2], w[4, :150], w[5] = 0, 1.5, 0
    w[5, 199] = -3.0
    s, x = Sparse.of(w), torch.randn(rows, 200).to(dtype)
    assert s is not None
    want = reference_sparse_matmul(x.float(), s.offsets, s.columns, s.values)
    torch.testing.assert_close(sparse_product(x, s.offsets, s.columns, s.values), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sparse_matmul(x[None], s.offsets, s.columns, s.values), want[None], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("scale", "block"), [((1, 1), None), ((40, 1), None), ((2, 5), (32, 128)), ((4, 10), (10, 60))], ids=str
)
def test_fp8(scale: tuple[int, int], block: tuple[int, int] | None, rows: int) -> None:
    check(floats(40, 576, scale, block), rows)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [1, 16])
def test_every_fp8_code(native: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One times a weight of all codes gives their values, exactly; NaN too, but the interpreter knows no NaN of FP8."""
    if native and torch.get_default_device().type == "cuda" and not byte.native_fp8(torch.device("cuda")):
        pytest.skip("this GPU has no fp8")
    monkeypatch.setattr(byte, "native_fp8", lambda device: native)
    codes = torch.arange(256, dtype=torch.uint8)
    if native and triton.interpreting():
        codes = codes[(codes & 127) != 127]
    codes = codes.view(gpu.E4M3)[:, None]
    got = product(torch.ones(rows, 1), gpu.pack_bytes(codes, torch.ones(1, 1)), None)
    torch.testing.assert_close(got, codes.float().T.expand(rows, -1), rtol=0, atol=0, equal_nan=True)


def test_int8_weights_alone() -> None:
    codes = torch.randint(-128, 128, (24, 100), dtype=torch.int8)
    for rows in (3, 17):
        check(gpu.pack_bytes(codes, torch.rand(24, 1) * 0.01), rows)


def test_no_rows_and_strided_rows() -> None:
    w = ints(4, 24, 64, 32)
    assert gpu.linear(torch.empty(0, 64), w).shape == (0, 24)
    x = torch.randn(5, 3, 128)[..., 32:96]
    torch.testing.assert_close(gpu.linear(x, w), gpu.reference_linear(x, w), rtol=1e-5, atol=1e-5)


def test_spans_divide_groups() -> None:
    assert [span_of(run, 64) for run in (0, 128, 64, 48, 33, 20)] == [64, 64, 64, 16, 1, 4]
