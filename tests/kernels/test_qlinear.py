"""The weight-only product against the dense weight, on every instruction set that this machine has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.kernels import _table, qlinear

if not qlinear.available():
    pytest.skip("the C++ extension is not built", allow_module_level=True)

SHAPES = [(48, 256, 64), (50, 576, 128), (33, 100, 32), (16, 576, -1), (5, 20, 8), (1, 7, 3)]
LEVELS = ["portable", "avx2", "avx512", "amx"]
EPS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = qlinear._C.isa()
    qlinear._C.limit_isa(request.param)
    if qlinear._C.isa() != request.param:
        qlinear._C.limit_isa(before)
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    qlinear._C.limit_isa(before)


def weight(out: int, columns: int, bits: int, group: int, dtype: torch.dtype = torch.float16, scatter: bool = False):
    """Random pack arguments: codes, scale, zero, bits, group, g_idx."""
    g = torch.Generator().manual_seed(out * 1000 + columns + bits)
    size = columns if group == -1 else group
    groups = -(-columns // size)
    codes = torch.randint(0, 2**bits, (out, columns), generator=g, dtype=torch.uint8)
    scale = (torch.rand(out, groups, generator=g) * 0.01 + 0.001).to(dtype)
    zero = torch.randint(0, 2**bits, (out, groups), generator=g, dtype=torch.uint8)
    g_idx = (torch.arange(columns) // size)[torch.randperm(columns, generator=g)] if scatter else None
    return codes, scale, zero, bits, group, g_idx


def dense(args) -> torch.Tensor:
    codes, scale, zero, _, group, g_idx = args
    return qlinear.reference_dense(codes, scale, zero, group, g_idx)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scatter", [False, True])
def test_product_is_the_dense_product(level: str, bits: int, scatter: bool) -> None:
    for (out, columns, group), dtype in itertools.product(SHAPES, EPS):
        args = weight(out, columns, bits, group, scatter=scatter)
        p, w, bias = qlinear.pack_weight(*args), dense(args), torch.randn(out)
        for rows in (1, 2, 3, 5, 8, 11, 17):
            x = torch.randn(rows, columns).to(dtype)
            exact = x.double() @ w.double().T + bias.double()
            bound = (x.double().abs() @ w.double().abs().T + bias.double().abs()).max()
            error = (qlinear.matmul(x, p, bias).double() - exact).abs().max() / bound
            assert error < EPS[dtype] * (3 if bits == 8 else 1), (out, columns, group, dtype, rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_pack_round_trip_and_dequantize_to_the_bit(level: str, bits: int) -> None:
    for (out, columns, group), dtype in itertools.product(SHAPES, (torch.float16, torch.bfloat16, torch.float32)):
        args = weight(out, columns, bits, group, dtype, scatter=columns % 2 == 0)
        p, w = qlinear.pack_weight(*args), dense(args)
        codes, scale, zero, g_idx = qlinear.unpack_weight(p)
        assert torch.equal(codes, args[0]) and torch.equal(scale, args[1]) and torch.equal(zero, args[2])
        assert g_idx is None or torch.equal(g_idx, args[5].int())
        assert torch.equal(qlinear.dequantize(p), w)
        assert torch.equal(qlinear.dequantize(p, torch.bfloat16), w.bfloat16())


def test_hand_packed_unit() -> None:
    """4 bits, column j holds j: even columns in the low half of the lane, odd ones in the high half."""
    p = qlinear.pack_weight(torch.arange(8, dtype=torch.uint8)[None], torch.ones(1, 1), torch.zeros(1, 1), 4, 8)
    assert p.codes[0].item() & 0xFFFFFFFF == 0x7531_6420
    assert p.codes[1:].count_nonzero() == 0
    assert qlinear.matmul(torch.eye(8), p).flatten().tolist() == list(range(8))


def test_no_result_depends_on_threads(level: str) -> None:
    args = weight(1040, 512, 4, 64)
    p, before = qlinear.pack_weight(*args), torch.get_num_threads()
    for rows, dtype in itertools.product((1, 5, 8), (torch.float32, torch.bfloat16)):
        x, results = torch.randn(rows, 512).to(dtype), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(qlinear.matmul(x, p))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("native_bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_go_through_tiles(dtype: torch.dtype, native_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlinear, "TILE_BLOCKS", dict.fromkeys(qlinear.TILE_BLOCKS, 2))
    monkeypatch.setattr(_table, "multiplies_bf16", lambda: native_bf16)
    args = weight(200, 256, 3, 64, scatter=True)
    p, w, x, bias = qlinear.pack_weight(*args), dense(args), torch.randn(64, 256).to(dtype), torch.randn(200)
    exact = x.double() @ w.double().T
    bound = (x.double().abs() @ w.double().abs().T).max()
    assert (qlinear.matmul(x, p).double() - exact).abs().max() / bound < EPS[dtype]
    assert (qlinear.matmul(x, p, bias).double() - exact - bias.double()).abs().max() / bound < EPS[dtype]


def test_special_values_come_through(level: str) -> None:
    args = weight(16, 64, 4, 32)
    p = qlinear.pack_weight(*args)
    x = torch.zeros(1, 64, dtype=torch.float16)
    x[0, 5] = float("inf")
    assert not qlinear.matmul(x, p).isfinite().any()
    x[0, 5] = 6e-8  # the smallest half
    got = qlinear.matmul(x, p, torch.ones(16))
    assert torch.equal(got, torch.ones(1, 16, dtype=torch.float16))
    big = qlinear.matmul(torch.full((1, 64), 60000.0, dtype=torch.float16), p)
    want = qlinear.reference_matmul(torch.full((1, 64), 60000.0, dtype=torch.float16), dense(args))
    assert torch.equal(big.isinf(), want.isinf())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [40, -1])
def test_integers_are_multiplied_exactly(level: str, bits: int, group: int) -> None:
    """Integers up to 2**14 in float32 and all the bytes in bfloat16: fixed-point activations lose nothing."""
    codes, _, zero, *rest = weight(20, 300, bits, group)
    scale = torch.ones(20, zero.shape[1])
    p, w = qlinear.pack_weight(codes, scale, zero, *rest), qlinear.reference_dense(codes, scale, zero, group)
    x = torch.randint(-256, 256, (3, 300)).float()
    exact = x.double() @ w.double().T
    assert torch.equal(qlinear.matmul(x, p).double(), exact)
    assert torch.equal(qlinear.matmul(x.bfloat16(), p), exact.bfloat16())


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("outlier", [1e2, 1e4])
def test_an_outlier_does_not_drown_its_group(level: str, dtype: torch.dtype, outlier: float) -> None:
    """The outlier meets codes equal to the zero point, so the small activations alone make the output."""
    codes, scale, zero, *rest = weight(32, 128, 4, 64)
    codes[:, 7] = zero[:, 0]
    p, w = qlinear.pack_weight(codes, scale, zero, *rest), qlinear.reference_dense(codes, scale, zero, 64)
    x = torch.randn(1, 128).to(dtype)
    x[0, 7] = outlier
    exact = x.double() @ w.double().T
    kept = x.double().abs()
    kept[0, 7] = 0
    bound = (kept @ w.double().abs().T).max()
    assert (qlinear.matmul(x, p).double() - exact).abs().max() / bound < EPS[dtype] + outlier * 2e-8


def test_tiny_and_huge_activations(level: str) -> None:
    args = weight(16, 64, 4, 32)
    p, w = qlinear.pack_weight(*args), dense(args)
    for size in (1e-26, 1e-20, 1e20, 1e33):
        x = torch.randn(1, 64) * size
        exact, bound = x.double() @ w.double().T, (x.double().abs() @ w.double().abs().T).max()
        assert (qlinear.matmul(x, p).double() - exact).abs().max() / bound < 4e-6


@pytest.mark.parametrize("scatter", [False, True])
def test_stacked_rows_are_the_same_bits(level: str, scatter: bool) -> None:
    a, b = weight(48, 100, 4, 32, scatter=scatter), weight(20, 100, 4, 32)
    first, second = qlinear.pack_weight(*a), qlinear.pack_weight(*b[:5], a[5])
    stacked = qlinear.stack([first, second])
    assert stacked is not None
    whole, views = stacked
    for x in (torch.randn(1, 100), torch.randn(3, 100).bfloat16(), torch.randn(40, 100)):
        want = [qlinear.matmul(x, p) for p in (first, second)]
        assert all(torch.equal(qlinear.matmul(x, v), y) for v, y in zip(views, want, strict=True))
        if len(x) <= qlinear.FUSED_ROWS:
            assert torch.equal(qlinear.matmul(x, whole), torch.cat(want, -1))
    assert torch.equal(qlinear.dequantize(whole), torch.cat([dense(a), dense((*b[:5], a[5]))]))
    assert torch.equal(qlinear.unpack_weight(views[1])[0], b[0])
    assert qlinear.stack([second, first]) is None  # 20 rows end inside a block
    assert qlinear.stack([first, qlinear.pack_weight(*weight(16, 100, 3, 32, scatter=scatter))]) is None
    assert (qlinear.stack([first, qlinear.pack_weight(*b)]) is None) == scatter


def test_wrong_arguments() -> None:
    codes, scale, zero, bits, group, _ = weight(16, 64, 4, 32)
    with pytest.raises(RequestError, match="scale has shape"):
        qlinear.pack_weight(codes, scale[:, :1], zero, bits, group)
    with pytest.raises(RequestError, match="bits 9"):
        qlinear.pack_weight(codes, scale, zero, 9, group)
    with pytest.raises(RequestError, match="g_idx does not give"):
        qlinear.pack_weight(codes, scale, zero, bits, group, torch.zeros(64))
    with pytest.raises(RequestError, match="takes 64"):
        qlinear.matmul(torch.ones(1, 65), qlinear.pack_weight(codes, scale, zero, bits, group))
