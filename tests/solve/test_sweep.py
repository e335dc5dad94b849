"""Oracles for the solvers: hand-computed examples, the exact solver, brute force, and the loss identity."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from fewbits.errors import FewbitsError, RequestError
from fewbits.grids import Int, clip_ratios
from fewbits.solve import Exact, Nearest, Sweep
from fewbits.solve.rounding import Plain
from fewbits.solve.sweep import inverse_factor, sweep
from fewbits.stats import Stats


def problem(out=8, columns=16, tokens=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) * 0.5 + torch.randn(columns, columns, generator=g) / columns**0.5
    x = torch.randn(tokens, columns, generator=g) @ mix
    stats = Stats.empty(columns)
    stats.update(x)
    return torch.randn(out, columns, generator=g), x, stats


def loss(q, w, gram, damp=0.01):
    d = q.dense().double() - w.double()
    H = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return float(((d @ H) * d).sum())


@dataclass(frozen=True)
class Fixed(Int):
    """An integer grid of step 1 around zero: the grid of the examples computed by hand."""

    def fit(self, w, importance=None):
        g = 1 if self.group == -1 else -(-w.shape[1] // self.group)
        return {"scale": torch.ones(len(w), g), "zero": torch.full((len(w), g), self.middle, dtype=torch.uint8)}


def test_example_by_hand():
    """H = [[2,1],[1,2]], w = (.6,.6), integers: the sweep reaches the optimum (1,0); rounding gives (1,1). Losses
    2*.28, 2*.48.
    """
    stats = Stats(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.ones(2), torch.ones(2), 1)
    w = torch.tensor([[0.6, 0.6]], dtype=torch.float64)
    grid = Fixed(4, -1, scale="float32")
    q = Sweep(damp=0.0)(w, grid, stats)
    assert q.dense().tolist() == [[1.0, 0.0]]
    assert q.meta["loss"] == pytest.approx(0.56, abs=1e-12)
    assert Nearest()(w.float(), grid, stats).dense().tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sweep_is_exact_elimination_in_fixed_order(bits, symmetric):
    """The Cholesky sweep and the Gaussian elimination of the inverse are the same algorithm (arXiv 2210.17323,
    section 3.3).
    """
    for seed in range(5):
        w, _, stats = problem(seed=seed)
        grid = Int(bits, -1, symmetric=symmetric, scale="float32")
        a = Sweep(importance=False)(w.double(), grid, stats)
        b = Exact(greedy=False)(w, grid, stats)
        assert torch.equal(a.codes, b.codes)
        assert a.meta["loss"] == pytest.approx(b.meta["loss"], rel=1e-10)


def test_exact_static_groups_in_any_order():
    """Static groups: the sweep in activation order equals elimination in that order."""
    w, _, stats = problem(columns=20)
    grid = Int(3, 8, scale="float32")
    perm = torch.argsort(stats.gram.diagonal(), descending=True, stable=True)
    a = Sweep(order="activation", static=True, importance=False)(w.double(), grid, stats)
    params = grid.fit(w)
    moved = Stats(stats.gram[perm][:, perm], stats.abssum[perm], stats.absmax[perm], stats.count)
    index = (torch.arange(20) // 8)[perm]

    @dataclass(frozen=True)
    class Given(Int):
        def fit(self, w, importance=None):
            return params | {"g_idx": index.int()}

    b = Exact(greedy=False)(w[:, perm], Given(3, 8, scale="float32"), moved)
    assert torch.equal(a.codes[:, perm], b.codes)


@pytest.mark.parametrize(
    "solver", [Sweep(), Sweep(static=True), Sweep(order="activation"), Sweep(order="activation", static=True)]
)
@pytest.mark.parametrize(
    "grid", [Int(4, 8), Int(3, -1), Int(2, 6, ratios=clip_ratios(0.5, 6)), Int(4, 16, symmetric=True)]
)
def test_loss_identity(solver, grid):
    """Σ e² of the sweep is tr((Q-W)(H+λI)(Q-W)ᵀ), for every order and kind of group, short last group included."""
    for columns in (16, 20):
        w, _, stats = problem(columns=columns, seed=columns)
        q = solver(w.double(), grid, stats)
        assert q.meta["loss"] == pytest.approx(loss(q, w, stats.gram), rel=1e-9)


def test_greedy_obq_equals_brute_force_of_its_rule():
    """Greedy OBQ, step by step, against inverses computed afresh of the matrix without the columns already fixed."""
    w, _, stats = problem(out=3, columns=5, seed=4)
    grid = Int(2, -1, scale="float32")
    q = Exact()(w, grid, stats)
    H = stats.gram.double() + 0.01 * stats.gram.double().diagonal().mean() * torch.eye(5, dtype=torch.float64)
    p = grid.fit(w)
    for r in range(3):
        x, left = w[r].double().clone(), list(range(5))
        row = {k: v[r : r + 1] for k, v in p.items()}
        while left:
            inv = torch.linalg.inv(H[left][:, left])
            rounded = grid.decode(grid.encode(x[None], row), row)[0].double()
            errors = [float((x[i] - rounded[i]).abs()) for i in left]
            k = min(range(len(left)), key=lambda k: errors[k] ** 2 / float(inv[k, k]))
            if max(errors) > float(p["scale"][r, 0]) / 2 * (1 + 1e-9):  # off the grid: at once
                k = errors.index(max(errors))
            e = (x[left[k]] - rounded[left[k]]) / inv[k, k]
            j = left.pop(k)
            rest = [i for i in range(len(left) + 1) if i != k]
            x[left] -= e * inv[k, rest]
            x[j] = rounded[j]
        assert torch.equal(x.float(), q.dense()[r])


def test_order_of_solvers_on_average():
    """Exhaustive optimum <= OBQ <= sweep <= nearest, in the mean over 50 problems of 6 weights on 4 levels (none is a
    theorem singly).
    """
    total = {"optimum": 0.0, "obq": 0.0, "sweep": 0.0, "nearest": 0.0}
    grid = Fixed(2, -1, scale="float32")
    every = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.uint8)
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        stats, x = Stats.empty(6), torch.randn(24, 6, generator=g)
        stats.update(x)
        w = torch.rand(1, 6, generator=g) * 2 - 1.5
        p = grid.fit(w)
        H = stats.gram.double() + 0.01 * stats.gram.double().diagonal().mean() * torch.eye(6, dtype=torch.float64)
        d = grid.decode(every, p).double() - w.double()
        total["optimum"] += float(((d @ H) * d).sum(1).min())
        total["obq"] += loss(Exact()(w, grid, stats), w, stats.gram)
        total["sweep"] += loss(Sweep(importance=False)(w.double(), grid, stats), w, stats.gram)
        total["nearest"] += loss(Nearest()(w, grid, stats), w, stats.gram)
    assert total["optimum"] <= total["obq"] <= total["sweep"] <= total["nearest"]
    assert total["sweep"] < 0.95 * total["nearest"]


def test_white_inputs_make_the_sweep_round_to_nearest():
    w, _, _ = problem(out=8, columns=64)
    white = Stats(torch.eye(64) * 3, torch.ones(64), torch.ones(64), 1)
    for bits, group in product((2, 3, 4, 8), (-1, 16, 24)):
        grid = Int(bits, group)
        assert torch.equal(Sweep()(w, grid, white).codes, Nearest()(w, grid, white).codes)


def test_worse_in_weights_better_in_outputs():
    w, x, stats = problem(out=32, columns=64, tokens=512)
    grid = Int(3, 16)
    near, swept = Nearest()(w, grid, stats).dense(), Sweep()(w, grid, stats).dense()
    assert (near - w).square().sum() < (swept - w).square().sum()
    assert (x @ (swept - w).T).square().sum() < 0.7 * (x @ (near - w).T).square().sum()


@pytest.mark.parametrize("columns", [12, 199])
def test_factor_identity(columns):
    """U_jj² = [(H_jj..)⁻¹]_00 for every j, and H⁻¹ = UᵀU with U upper triangular."""
    _, _, stats = problem(columns=columns, tokens=2 * columns)
    H = stats.gram.double()
    U, used = inverse_factor(H, torch.zeros(columns, dtype=torch.bool), 0.01)
    H = H + 0.01 * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    assert torch.allclose(U.T @ U, torch.linalg.inv(H), rtol=1e-10, atol=1e-12) and not bool(U.tril(-1).any())
    for j in range(0, columns, max(1, columns // 12)):
        assert float(U[j, j] ** 2) == pytest.approx(float(torch.linalg.inv(H[j:, j:])[0, 0]), rel=1e-10)
    assert used == {"damp": 0.01, "float64": 0.0}


def test_expected_loss_on_an_unbounded_grid():
    """E[loss] = s²/12 Σ 1/U_jj² for generic weights, and s²/4 Σ 1/U_jj² is a bound (Babai's nearest plane)."""
    torch.manual_seed(0)
    _, _, stats = problem(columns=64, tokens=256)
    U, _ = inverse_factor(stats.gram.double(), torch.zeros(64, dtype=torch.bool), 0.01)
    w = torch.randn(2000, 64, dtype=torch.float64) * 3
    grid = Fixed(8, -1, scale="float32")
    p = grid.fit(w)
    codes, _ = sweep(w, U, Plain(grid), p, torch.zeros(64, dtype=torch.int64))
    d = grid.decode(codes, p).double() - w
    inverse = U.T @ U
    rows = ((d @ torch.linalg.inv(inverse)) * d).sum(1)
    pivots = float((1 / U.diagonal() ** 2).sum())
    assert float(rows.max()) <= pivots / 4 * (1 + 1e-9)
    assert float(rows.mean()) == pytest.approx(pivots / 12, rel=0.02)


def test_activation_order_is_equivariant():
    """Permuting the input features permutes the result (distinct diagonals)."""
    w, _, stats = problem(columns=24)
    perm = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = Stats(stats.gram[perm][:, perm], stats.abssum[perm], stats.absmax[perm], stats.count)
    solver, grid = Sweep(order="activation"), Int(3, -1)
    a = solver(w.double(), grid, stats).dense()
    b = solver(w[:, perm].double(), grid, moved).dense()
    assert torch.equal(a[:, perm], b)


def test_scattered_groups_have_their_size():
    w, _, stats = problem(columns=20)
    q = Sweep(order="activation")(w, Int(4, 8), stats)
    assert torch.bincount(q.params["g_idx"].long()).tolist() == [8, 8, 4]
    assert float((q.dense() - w).abs().max()) < 1.0


def test_dead_columns_are_rounded_to_nearest_and_feed_nothing():
    w, _, stats = problem(columns=16)
    stats.gram[3], stats.gram[:, 3] = 0, 0
    q = Sweep(static=True, importance=False)(w, Int(4, 8), stats)
    near = Nearest()(w, Int(4, 8), stats)
    assert torch.equal(q.codes[:, 3], near.codes[:, 3])
    other = w.clone()
    other[:, 3] /= 2  # within the range of its group, so that no scale changes
    live = [c for c in range(16) if c != 3]
    swept = Sweep(static=True, importance=False)(other, Int(4, 8), stats).codes
    same = (Int(4, 8).fit(other)["scale"][:, 0] == Int(4, 8).fit(w)["scale"][:, 0]).nonzero()[:, 0]
    assert len(same) >= 4
    assert torch.equal(swept[same][:, live], q.codes[same][:, live])
    stats.gram.zero_()
    assert torch.equal(Sweep()(w, Int(4, 8), stats).codes, near.codes)


def test_singular_gram_is_damped_and_reported():
    """One token repeated: rank 1. The ladder ends with a finite result and says what it took."""
    w, _, _ = problem(columns=16)
    stats = Stats.empty(16)
    stats.update(torch.full((64, 16), 1e-3))
    q = Sweep(damp=0.0)(w, Int(4, 8), stats)
    assert torch.isfinite(q.dense()).all()
    assert q.meta["damp"] > 0


def test_infinite_activations_are_refused():
    w, _, stats = problem()
    stats.gram[0, 0] = torch.inf
    with pytest.raises(FewbitsError, match="not finite"):
        Sweep()(w, Int(4, 8), stats)


def test_float32_agrees_with_float64():
    w, _, stats = problem(out=64, columns=256, tokens=2048)
    grid = Int(4, 64, ratios=clip_ratios(0.8, 5))
    a, b = Sweep(static=True)(w, grid, stats), Sweep(static=True)(w.double(), grid, stats)
    assert float((a.codes == b.codes).float().mean()) > 0.995
    assert a.meta["loss"] == pytest.approx(b.meta["loss"], rel=0.01)


def test_result_does_not_depend_on_threads():
    w, _, stats = problem(out=200, columns=300, tokens=2048)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(Sweep()(w, Int(4, 64, ratios=clip_ratios(0.7, 7)), stats))
    finally:
        torch.set_num_threads(before)
    for r in results[1:]:
        assert torch.equal(r.codes, results[0].codes)
        assert torch.equal(r.params["scale"], results[0].params["scale"])


def test_obq_refuses_wide_layers():
    with pytest.raises(RequestError, match="1024"):
        Exact()(torch.zeros(1, 2048), Int(4, -1), Stats.empty(2048))


def test_generic_feedback_equals_the_kernel():
    """Any scalar grid can be swept column by column; the fused kernel of the uniform grid must agree with that."""
    from fewbits.grids.base import feedback

    w, _, stats = problem(out=16, columns=32)
    U, _ = inverse_factor(stats.gram, torch.zeros(32, dtype=torch.bool), 0.01)
    grid = Int(4, 8)
    p, index = grid.fit(w), torch.arange(32) // 8
    a, ea = grid.feedback(w.clone(), U, p, index)
    b, eb = feedback(grid, w.clone(), U, p, index)
    assert torch.equal(a, b)
    assert torch.allclose(ea, eb, rtol=1e-5, atol=1e-5)
