"""gram_, fit_affine and sweep_block_: C++ against the specification in plain torch, against float64, and by hand."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from fewbits import kernels
from fewbits.errors import RequestError
from fewbits.kernels import _table, reference

needs_native = pytest.mark.skipif(_table.C is None, reason="the C++ extension is not built")
LEVELS = _table.LEVELS[: _table.LEVELS.index(_table.C.detected_isa()) + 1] if _table.C else ()


@pytest.fixture
def level():
    """Sets the instruction set for one test."""
    yield _table.C.limit_isa
    _table.C.limit_isa("amx")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# gram_


@needs_native
@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 7), (512, 32), (513, 100), (1100, 64), (700, 300), (33, 576)])
def test_gram_equals_the_sum_in_float64(level, isa, dtype, rows, n):
    level(isa)
    x = (normal(rows, n) * torch.logspace(-2, 1, n) + 0.3).to(dtype)
    start = normal(n, n, seed=1)
    start = start + start.T
    G = start.clone()
    kernels.gram_(G, x)
    exact = start.double() + x.double().T @ x.double()
    # Each sum is as exact as the size of its terms allows.
    size = start.double().abs() + x.double().abs().T @ x.double().abs()
    assert ((G - exact).abs() / size).max() < (1e-6 if rows < 1000 else 2e-6)
    assert torch.equal(G, G.T)


@needs_native
@pytest.mark.parametrize("isa", LEVELS)
def test_gram_of_small_integers_is_exact(level, isa):
    level(isa)
    x = torch.randint(-8, 9, (600, 70), generator=torch.Generator().manual_seed(0)).bfloat16()
    G = torch.zeros(70, 70)
    kernels.gram_(G, x)
    assert torch.equal(G, (x.long().T @ x.long()).float())


@needs_native
def test_gram_relative_error_over_many_rows():
    x = normal(4096, 96).bfloat16()
    G = torch.zeros(96, 96)
    kernels.gram_(G, x)
    exact = x.double().T @ x.double()
    assert ((G - exact).abs() / exact.diagonal().mean()).max() < 1e-6
    assert ((G.double() - exact) / exact).diagonal().abs().max() < 1e-5


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_does_not_depend_on_threads(threads, dtype):
    x = normal(600, 577).to(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        G = torch.zeros(577, 577)
        kernels.gram_(G, x)
        results.append(G)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_native
def test_gram_takes_slices_and_adds_up():
    wide = normal(64, 200).bfloat16()
    sliced, compact = torch.zeros(100, 100), torch.zeros(100, 100)
    kernels.gram_(sliced, wide[:, 50:150])
    kernels.gram_(compact, wide[:, 50:150].contiguous())
    assert torch.equal(sliced, compact)
    transposed = torch.zeros(64, 64)
    kernels.gram_(transposed, wide.T)
    assert torch.allclose(transposed, wide.float() @ wide.float().T, rtol=1e-4, atol=1e-4)
    kernels.gram_(compact, wide[:0, :100])
    assert torch.equal(sliced, compact)


@needs_native
def test_gram_leaves_torch_bfloat16_products_alone():
    a, b = normal(256, 256).bfloat16(), normal(256, 256, seed=1).bfloat16()
    before = a @ b
    for _ in range(3):
        kernels.gram_(torch.zeros(256, 256), a)
        assert torch.equal(a @ b, before)


def test_gram_reference_is_symmetric_and_exact():
    x = torch.randint(-8, 9, (60, 17), generator=torch.Generator().manual_seed(0)).bfloat16()
    G = torch.ones(17, 17)
    reference.gram_(G, x)
    assert torch.equal(G, (x.long().T @ x.long()).float() + 1)


# fit_affine


def error_of(w, scale, zero, group, qmax, importance=None, norm=2.0):
    """Error per group, in float64."""
    index = torch.arange(w.shape[1]) // group
    s, z = scale.double()[:, index], zero.double()[:, index]
    code = (torch.round((w / s.float()).double()) + z).clamp(0, qmax)
    e = (w.double() - s * (code - z)).abs() ** norm
    e = e if importance is None else e * importance.double()
    return torch.zeros(scale.shape, dtype=torch.float64).index_add_(1, index, e)


def grid_of_ratios(steps: int, lowest: float = 0.5) -> torch.Tensor:
    r = torch.linspace(1, lowest, steps)
    return torch.cartesian_prod(r, r)


FITS = [
    # rows, columns, group, bits, symmetric, candidates, importance, dtype, norm
    (5, 128, 64, 4, False, grid_of_ratios(5), False, torch.float16, 2.0),
    (7, 300, 128, 3, False, grid_of_ratios(6), True, torch.bfloat16, 2.0),
    (3, 77, -1, 2, False, grid_of_ratios(4), False, torch.float32, 2.4),
    (9, 130, 32, 4, True, grid_of_ratios(3), True, torch.float16, 2.4),
    (4, 33, 16, 8, True, grid_of_ratios(1), False, torch.float16, 2.0),
    (6, 100, 1000, 5, True, grid_of_ratios(2), False, torch.bfloat16, 2.0),
    (2, 5, 3, 1, False, grid_of_ratios(7), True, torch.float16, 2.0),
]


@needs_native
@pytest.mark.parametrize("isa", LEVELS[:3])
@pytest.mark.parametrize("case", FITS, ids=lambda c: f"{c[0]}x{c[1]}-g{c[2]}-b{c[3]}-{'sym' if c[4] else 'affine'}")
def test_fit_equals_the_reference(level, isa, case):
    rows, columns, group, bits, symmetric, ratios, weighted, dtype, norm = case
    level(isa)
    w = normal(rows, columns) ** 3
    importance = normal(columns, seed=1).abs() if weighted else None
    args = (2**bits - 1, symmetric, ratios, importance, dtype, norm)
    scale, zero = kernels.fit_affine(w, group, *args)
    width = columns if group == -1 else min(group, columns)
    wanted_scale, wanted_zero = reference.fit_affine(w, width, *args)
    same = (scale == wanted_scale) & (zero == wanted_zero)
    assert scale.shape == wanted_scale.shape == (rows, -(-columns // width))
    ours = error_of(w, scale, zero, width, args[0], importance, norm)
    theirs = error_of(w, wanted_scale, wanted_zero, width, args[0], importance, norm)
    assert (ours <= theirs * (1 + 1e-5)).all()
    # Candidates with clearly different errors must be the same choice, to the last bit.
    assert (same | ((ours - theirs).abs() <= theirs * 1e-5)).all()


@needs_native
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_fit_chooses_the_same_parameters(symmetric, norm):
    w = normal(256, 1024)
    ratios = torch.linspace(1, 0.6, 20)[:, None].expand(20, 2)
    scale, zero = kernels.fit_affine(w, 64, 15, symmetric, ratios, None, torch.float16, norm)
    wanted_scale, wanted_zero = reference.fit_affine(w, 64, 15, symmetric, ratios, None, torch.float16, norm)
    assert ((scale == wanted_scale) & (zero == wanted_zero)).double().mean() >= 0.999


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_candidate_is_bit_equal_over_the_whole_range(dtype, symmetric):
    """Every exponent, so subnormal halves, halves that overflow and groups that underflow too."""
    size = torch.logspace(-44, 37, 600, dtype=torch.float64).float()[:, None]
    w = normal(600, 16) * size
    args = (w, 16, 15, symmetric, torch.ones(1, 2), None, dtype)
    scale, zero = kernels.fit_affine(*args)
    wanted_scale, wanted_zero = reference.fit_affine(*args)
    assert torch.equal(scale, wanted_scale) and torch.equal(zero, wanted_zero)
    assert torch.equal(scale, scale.to(dtype).float()) and (scale > 0).all() and scale.isfinite().all()


@pytest.mark.parametrize("fit", [kernels.fit_affine, reference.fit_affine])
def test_fit_by_hand(fit):
    w = torch.tensor([[-1.0, 0.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 1.5], [-3.0, -1.0, -2.0, -1.5]])
    scale, zero = fit(w, 4, 3, False, torch.ones(1, 2), None, torch.float32)
    assert scale.tolist() == [[1.0], [1.0], [1.0], [1.0]] and zero.tolist() == [[1.0], [0.0], [0.0], [3.0]]
    scale, zero = fit(w, 4, 3, True, torch.ones(1, 2), None, torch.float32)
    assert scale.flatten().tolist() == pytest.approx([4 / 3, 1.0, 2.0, 2.0]) and zero.flatten().tolist() == [2.0] * 4


@pytest.mark.parametrize("fit", [kernels.fit_affine, reference.fit_affine])
def test_importance_decides_between_candidates_and_the_first_of_equals_wins(fit):
    # Clipping to half makes 0.5 exact and loses 1.0 (here 1 bit: codes 0 and 1).
    w, ratios = torch.tensor([[1.0, 0.5, 0.5]]), torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    for importance, wanted in (([1.0, 0.0, 0.0], 1.0), ([0.0, 1.0, 1.0], 0.5), ([0.0, 0.0, 0.0], 1.0)):
        scale, _ = fit(w, 3, 1, False, ratios, torch.tensor(importance), torch.float16)
        assert scale.item() == wanted
    copies = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]])
    assert fit(w, 3, 1, False, copies, None, torch.float16)[0].item() == 0.5


@needs_native
def test_fit_gives_the_same_bits_on_every_cpu_and_any_number_of_threads(level, threads):
    w, importance = normal(40, 700), normal(700, seed=1).abs()
    results = []
    for isa in LEVELS:
        for count in (1, 2, 3):
            level(isa)
            threads(count)
            results.append(kernels.fit_affine(w, 96, 7, False, grid_of_ratios(7), importance, torch.float16, 2.4))
    assert all(torch.equal(s, results[0][0]) and torch.equal(z, results[0][1]) for s, z in results)


# sweep_block_


def problem(rows: int, block: int, segments: int, dtype=torch.float32):
    w = normal(rows, block).to(dtype)
    x = normal(4 * block + 8, block, seed=1).double()
    u = torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True).to(dtype)
    scale = (normal(rows, segments, seed=2).abs() * 0.1 + 0.15).to(dtype)
    zero = torch.randint(0, 16, (rows, segments), generator=torch.Generator().manual_seed(3)).to(dtype)
    return w, u, scale, zero, (torch.arange(block) * segments // block).int()


@needs_native
@pytest.mark.parametrize("isa", LEVELS[:3])
@pytest.mark.parametrize(
    ("rows", "block", "segments"), [(1, 1, 1), (17, 5, 2), (100, 64, 1), (33, 128, 4), (70, 256, 256)]
)
def test_sweep_is_bit_equal_to_the_reference(level, isa, rows, block, segments):
    level(isa)
    w, u, scale, zero, segment = problem(rows, block, segments)
    ours, theirs = w.clone(), w.clone()
    codes, err = kernels.sweep_block_(ours, u, scale, zero, segment, 15)
    wanted_codes, wanted_err = reference.sweep_block_(theirs, u, scale, zero, segment, 15)
    assert torch.equal(codes, wanted_codes) and torch.equal(err, wanted_err) and torch.equal(ours, theirs)


@needs_native
@pytest.mark.parametrize("isa", LEVELS[:3])
@pytest.mark.parametrize("limit", [float("inf"), 2.0, 0.0])
@pytest.mark.parametrize(("rows", "block", "segments"), [(1, 1, 1), (17, 5, 2), (100, 64, 5), (70, 256, 256)])
def test_sweep_that_keeps_weights_is_bit_equal_to_the_reference(level, isa, rows, block, segments, limit):
    level(isa)
    w, u, scale, zero, segment = problem(rows, block, segments)
    w[::3] *= torch.logspace(-5, 5, block)  # what is kept spans float16, its subnormals and its infinity
    ours, theirs, zero = w.clone(), w.clone(), zero + 0.3
    got = kernels.sweep_kept_(ours, u, scale, zero, segment, 15, limit)
    wanted = reference.sweep_kept_(theirs, u, scale, zero, segment, 15, limit)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    assert rows == 1 or bool((got[2] != 0).any()) == (limit != float("inf"))


@needs_native
def test_sweep_does_not_depend_on_threads_or_on_the_split_of_rows(threads):
    w, u, scale, zero, segment = problem(150, 48, 3)
    whole = w.clone()
    codes, err = kernels.sweep_block_(whole, u, scale, zero, segment, 15)
    for count in (1, 2, 3):
        threads(count)
        parts = []
        for rows in (slice(0, 1), slice(1, 40), slice(40, 150)):
            parts.append(kernels.sweep_block_(w[rows].clone(), u, scale[rows], zero[rows], segment, 15))
        assert torch.equal(torch.cat([c for c, _ in parts]), codes) and torch.equal(
            torch.cat([e for _, e in parts]), err
        )


@needs_native
def test_sweep_works_on_column_slices_in_place():
    w, u, scale, zero, segment = problem(20, 32, 2)
    alone = w.clone()
    codes, err = kernels.sweep_block_(alone, u, scale, zero, segment, 15)
    wide, factor = torch.full((20, 96), 7.0), torch.full((96, 96), 7.0)
    wide[:, 32:64], factor[32:64, 32:64] = w, u
    inside, inside_err = kernels.sweep_block_(wide[:, 32:64], factor[32:64, 32:64], scale, zero, segment, 15)
    assert torch.equal(inside, codes) and torch.equal(inside_err, err) and torch.equal(wide[:, 32:64], alone)
    assert (wide[:, :32] == 7).all() and (wide[:, 64:] == 7).all()
    turned = w.T.contiguous().T
    assert torch.equal(kernels.sweep_block_(turned, u, scale, zero, segment, 15)[0], codes) and torch.equal(
        turned, alone
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweep_of_two_weights_by_hand(dtype):
    """H = [[2, 1], [1, 2]], w = (.6, .6), integer grid: the result is (1, 0) with losses .12 and .16."""
    u = torch.tensor([[math.sqrt(2 / 3), -math.sqrt(1 / 6)], [0, math.sqrt(1 / 2)]], dtype=dtype)
    w = torch.tensor([[0.6, 0.6]], dtype=dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    codes, err = kernels.sweep_block_(w, u, one, zero, torch.zeros(2, dtype=torch.int32), 3)
    assert codes.tolist() == [[1, 0]] and codes.dtype == torch.uint8 and err.dtype == dtype
    assert w[0].tolist() == pytest.approx([0.6, 0.4], rel=1e-6)
    assert (err**2 / 2)[0].tolist() == pytest.approx([0.12, 0.16], rel=1e-5)


def test_losses_of_a_sweep_add_up_to_the_error_of_the_output():
    """sum(err^2) / 2 = tr(D H D^T) / 2 with the damped H: the identity that ties u to H."""
    w, u, scale, zero, segment = problem(11, 24, 2, torch.float64)
    H = torch.linalg.inv(u.T @ u)
    codes, err = kernels.sweep_block_(w.clone(), u, scale, zero, segment, 15)
    index = segment.long()
    D = scale[:, index] * (codes.double() - zero[:, index]) - w
    assert (err**2).sum().item() == pytest.approx((D @ H * D).sum().item(), rel=1e-9)


def test_identity_hessian_means_nearest_codes():
    w, _, scale, zero, segment = problem(40, 64, 4)
    before, index = w.clone(), segment.long()
    codes, _ = kernels.sweep_block_(w, torch.eye(64), scale, zero, segment, 15)
    assert torch.equal(w, before)
    assert torch.equal(codes, (torch.round(w / scale[:, index]) + zero[:, index]).clamp(0, 15).to(torch.uint8))


# the table


def test_info_names_every_op():
    chosen = kernels.info()
    assert {"gram_", "fit_affine", "sweep_block_"} <= set(chosen) and set(chosen) == set(kernels.schemas())
    wanted = "reference" if _table.C is None else "native"
    assert all(choice.implementation == wanted and choice.why for choice in chosen.values())


def test_environment_forces_the_reference():
    code = "from fewbits import kernels; print({c.implementation for c in kernels.info().values()})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FEWBITS_KERNELS": "reference"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "{'reference'}", done.stderr


ONE, FEW = torch.ones(1, 2), torch.zeros(4, 4)
WRONG = {
    "gram_ of another width": lambda: kernels.gram_(torch.zeros(3, 3), FEW),
    "gram_ of integers": lambda: kernels.gram_(torch.zeros(4, 4), FEW.int()),
    "gram_ into float64": lambda: kernels.gram_(torch.zeros(4, 4).double(), FEW),
    "fit of float64": lambda: kernels.fit_affine(FEW.double(), 4, 15, False, ONE, None, torch.float16),
    "group 0": lambda: kernels.fit_affine(FEW, 0, 15, False, ONE, None, torch.float16),
    "qmax 0": lambda: kernels.fit_affine(FEW, 4, 0, False, ONE, None, torch.float16),
    "no candidates": lambda: kernels.fit_affine(FEW, 4, 15, False, ONE[:0], None, torch.float16),
    "importance of another length": lambda: kernels.fit_affine(FEW, 4, 15, False, ONE, torch.ones(3), torch.float16),
    "an integer scale": lambda: kernels.fit_affine(FEW, 4, 15, False, ONE, None, torch.int8),
    "segment outside": lambda: kernels.sweep_block_(FEW, FEW, FEW[:, :1], FEW[:, :1], torch.ones(4).int(), 15),
    "segment of int64": lambda: kernels.sweep_block_(FEW, FEW, FEW[:, :1], FEW[:, :1], torch.zeros(4).long(), 15),
    "u of another size": lambda: kernels.sweep_block_(FEW, FEW[:3, :3], FEW, FEW, torch.zeros(4).int(), 15),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_refused_in_one_line(what):
    with pytest.raises(RequestError) as refused:
        WRONG[what]()
    assert "\n" not in str(refused.value)
