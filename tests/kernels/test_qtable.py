"""Products on tables against the dense weight, on every instruction set that this machine has."""

from __future__ import annotations

import itertools

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.grids.codebook import codebook
from fewbits.kernels import qlinear, qtable

from .test_qlinear import EPS, LEVELS, level

assert level  # a fixture

# QLoRA (arXiv 2305.14314), appendix E, to the digits of float32.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E3M2 = [m / 4 * 2.0**-2 if e == 0 else (1 + m / 4) * 2.0 ** (e - 3) for e in range(8) for m in range(4)]
TABLES = {
    "nf4": torch.tensor(NF4),
    "e2m1": torch.tensor(E2M1 + [-v for v in E2M1]),
    "ternary": torch.tensor([-1.0, 0.0, 1.0]),
    "e3m2": torch.tensor(E3M2 + [-v for v in E3M2]),
    "e4m3": qtable.fp8_table(qtable.E4M3),
    "e5m2": qtable.fp8_table(qtable.E5M2),
}
SHAPES = [(48, 256, 64), (50, 576, 128), (33, 100, 32), (16, 64, 16), (16, 576, -1), (5, 20, 8), (1, 7, 3)]


def weight(out: int, columns: int, group: int, table: torch.Tensor, scatter: bool = False):
    """Random pack arguments: codes of finite values, scale, table, group, g_idx."""
    g = torch.Generator().manual_seed(out * 1000 + columns)
    size = columns if group == -1 else group
    finite = table.isfinite().nonzero().flatten()
    codes = finite[torch.randint(0, len(finite), (out, columns), generator=g)].to(torch.uint8)
    scale = torch.rand(out, -(-columns // size), generator=g) * 0.01 + 0.001
    g_idx = (torch.arange(columns) // size)[torch.randperm(columns, generator=g)] if scatter else None
    return codes, scale, table, group, g_idx


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("scatter", [False, True])
def test_product_is_the_dense_product(level: str, name: str, scatter: bool) -> None:
    for (out, columns, group), dtype in itertools.product(SHAPES, EPS):
        args = weight(out, columns, group, TABLES[name], scatter)
        p, w, bias = qtable.pack_table(*args), qtable.reference_dense(*args), torch.randn(out)
        for rows in (1, 2, 3, 8, 11, 17):
            x = torch.randn(rows, columns).to(dtype)
            exact = x.double() @ w.double().T + bias.double()
            bound = (x.double().abs() @ w.double().abs().T + bias.double().abs()).max()
            error = (qlinear.matmul(x, p, bias).double() - exact).abs().max() / bound
            assert error < EPS[dtype], (out, columns, group, dtype, rows)


@pytest.mark.parametrize("name", list(TABLES))
def test_every_code_dequantizes_to_the_bit(level: str, name: str) -> None:
    table = TABLES[name]
    codes = table.isfinite().nonzero().flatten().to(torch.uint8).repeat(17, 1)
    args = (codes, torch.rand(17, -(-codes.shape[1] // 32)) + 0.1, table, 32)
    for scale in (args[1], args[1].half(), args[1].bfloat16()):
        p, w = qtable.pack_table(codes, scale, table, 32), qtable.reference_dense(codes, scale, table, 32)
        assert torch.equal(qlinear.dequantize(p), w)
        assert torch.equal(qlinear.dequantize(p, torch.bfloat16), w.bfloat16())
    one = qtable.pack_table(codes, torch.ones(17, 1), table, -1)
    assert torch.equal(qlinear.matmul(torch.eye(codes.shape[1])[:9], one), table[codes[:, :9].long()].T)


def test_fp8_tables_are_kept_as_they_are() -> None:
    """FP6 becomes FP8 numbers of the same value; FP8 codes stay the bytes that they are."""
    args = weight(16, 64, 32, TABLES["e4m3"])
    assert torch.equal(qlinear.unpack_codes(qtable.pack_table(*args)), args[0])
    args = weight(16, 64, 32, TABLES["e3m2"])
    eights = qlinear.unpack_codes(qtable.pack_table(*args)).view(torch.float8_e4m3fn).float()
    assert torch.equal(eights, TABLES["e3m2"][args[0].long()])


@pytest.mark.parametrize("name", ["nf4", "e4m3"])
def test_no_result_depends_on_threads_or_stacking(level: str, name: str) -> None:
    args = weight(1040, 512, 64, TABLES[name])
    p, before = qtable.pack_table(*args), torch.get_num_threads()
    for rows, dtype in itertools.product((1, 2, 5), (torch.float32, torch.bfloat16)):
        x, results = torch.randn(rows, 512).to(dtype), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(qlinear.matmul(x, p))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        stacked = qlinear.stack([p, p])
        assert stacked is not None and torch.equal(qlinear.matmul(x, stacked[0]), torch.cat([results[0]] * 2, -1))
    assert qlinear.stack([p, qtable.pack_table(*weight(1040, 512, 64, TABLES["e2m1"]))]) is None


@pytest.mark.parametrize("name", ["e2m1", "ternary"])
@pytest.mark.parametrize(("columns", "group"), [(128, 16), (128, 32), (256, -1), (300, 20), (200, 150), (72, 8)])
def test_small_tables_are_exact(level: str, name: str, columns: int, group: int) -> None:
    """Whole numbers and scales of powers of two: every sum is a float32 number."""
    table, groups = TABLES[name], 1 if group == -1 else -(-columns // group)
    g = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, len(table), (35, columns), generator=g).to(torch.uint8)
    scale = 2.0 ** torch.randint(-3, 1, (35, groups), generator=g)
    args = (codes, scale, table, group)
    p, w = qtable.pack_table(*args), qtable.reference_dense(*args)
    for rows in range(1, 6):
        x = torch.randint(-2000, 2000, (rows, columns), generator=g).float()
        assert torch.equal(qlinear.matmul(x, p).double(), x.double() @ w.double().T), rows


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_error_of_tables_in_16_bits(level: str, name: str) -> None:
    """At most 2**-16 of the largest value for each weight, seen where two nearly cancel: bfloat16 hides more."""
    table = codebook(name).values
    pairs = [(a, b) for a in range(16) for b in range(16) if table[b] != 0]
    x = (-table[[a for a, _ in pairs]] / table[[b for _, b in pairs]]).bfloat16()
    for (a, b), r in zip(pairs, x, strict=True):
        p = qtable.pack_table(torch.tensor([[a, b]], dtype=torch.uint8), torch.ones(1, 1), table, -1)
        inputs = torch.stack([torch.ones(()).bfloat16(), r])[None]
        exact = float(inputs[0].double() @ table[[a, b]].double())
        bound = 2**-16 * (1 + abs(float(r))) + 2**-9 * abs(exact)
        assert abs(float(qlinear.matmul(inputs, p)) - exact) <= bound, (a, b)


@pytest.mark.parametrize("name", ["nf4", "e2m1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_outlier_does_not_drown_the_others(level: str, name: str, dtype: torch.dtype) -> None:
    """It meets weights of 0: what is left must be as accurate as without it."""
    codes, scale, table, group, _ = weight(33, 256, 64, TABLES[name])
    codes[:, 7] = int((table == 0).nonzero()[0])
    p, w = qtable.pack_table(codes, scale, table, group), qtable.reference_dense(codes, scale, table, group)
    for rows in (1, 2, 4):
        x = torch.randn(rows, 256)
        x[:, 7] = 3e3
        x = x.to(dtype)
        exact, rest = x.double() @ w.double().T, (x.double().abs() @ w.double().abs().T).max()
        assert (qlinear.matmul(x, p).double() - exact).abs().max() / rest < EPS[dtype]


@pytest.mark.parametrize("name", ["nf4", "e5m2"])
def test_special_activations_come_through(level: str, name: str) -> None:
    p = qtable.pack_table(*weight(16, 64, 32, TABLES[name]))
    for special in (float("inf"), float("nan")):
        x = torch.ones(1, 64)
        x[0, 5] = special
        assert not qlinear.matmul(x, p).isfinite().any()


def test_wrong_arguments() -> None:
    codes, scale, table, group, _ = weight(16, 64, 32, TABLES["e4m3"])
    with pytest.raises(RequestError, match="scale has shape"):
        qtable.pack_table(codes, scale[:, :1], table, group)
    with pytest.raises(RequestError, match="code 17 is beyond"):
        qtable.pack_table(torch.full_like(codes, 17), scale, TABLES["nf4"], group)
    with pytest.raises(RequestError, match=r"holds nan \(code 127\)"):
        qtable.pack_table(torch.full_like(codes, 127), scale, table, group)
    with pytest.raises(RequestError, match="table of 64 values"):
        qtable.pack_table(codes % 64, scale, torch.arange(64) / 63, group)


assert set(LEVELS) >= {"portable", "avx2"}
