"""Pruning: OBD, OBS, SparseGPT against inverses computed afresh, brute force, laws and exact counts."""

import itertools
import json

import pytest
import torch

from fewbits import api, methods
from fewbits.errors import RequestError
from fewbits.grids import NAMED_GRIDS, Int, Int16, Learned
from fewbits.plan import Recipe
from fewbits.solve import Exact, Surgeon, Sweep
from fewbits.solve.prune import Sparsity, holds_zero
from fewbits.solve.sweep import inverse_factor
from fewbits.stats import Stats
from tests.solve.test_gptaq import SMALL as CALIBRATED
from tests.solve.test_gptaq import TEXT, damped
from tests.solve.test_sweep import Fixed, problem
from tests.tiny import tiny_model, tiny_tokenizer

DOUBLE = torch.float64


def white(columns):
    return Stats(torch.eye(columns) * 3, torch.ones(columns), torch.ones(columns), 1)


def test_surgery_by_hand():
    """H = [[2,1],[1,2]], w = (1,3): the first goes, at a loss of 2 * .75, and the second becomes 3.5."""
    stats = Stats(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.ones(2), torch.ones(2), 1)
    q = Surgeon(damp=0.0)(torch.tensor([[1.0, 3.0]], dtype=DOUBLE), Int16(), stats)
    assert q.dense().tolist() == [[0.0, pytest.approx(3.5, rel=1e-4)]]
    assert q.meta["loss"] == pytest.approx(2 * 0.75, rel=1e-4)


def test_obs_is_the_rule_step_by_step():
    """Inverses of the matrix without the columns already removed, computed afresh; and the result is the least-squares
    answer on what is left.
    """
    w, _, stats = problem(out=4, columns=8, seed=3)
    H = damped(stats.gram)
    q = Surgeon("0.5")(w.double(), Int16(), stats)
    for r in range(4):
        left = list(range(8))
        x = w[r].double().clone()
        for _ in range(4):
            inv = torch.linalg.inv(H[left][:, left])
            k = min(range(len(left)), key=lambda k: float(x[left[k]] ** 2 / inv[k, k]))
            x[left] -= x[left[k]] / inv[k, k] * inv[k]
            x[left.pop(k)] = 0
        assert torch.equal(q.dense()[r] != 0, x != 0)
        assert torch.allclose(q.dense()[r].double(), x, atol=3e-4)
        gradient = (x - w[r].double()) @ H
        assert float(gradient[left].abs().max()) < 1e-9 * float(H.max())


def test_greedy_surgery_against_every_mask():
    """4 columns, 2 removed: never better than the best of the 6 masks with its own least-squares answer, at most a
    third worse in the mean over 40 problems; OBD without compensation is worse.
    """
    total = {"best": 0.0, "obs": 0.0, "obd": 0.0}
    for seed in range(40):
        w, _, stats = problem(out=1, columns=4, seed=seed)
        H, w = damped(stats.gram), w.double()
        losses = []
        for keep in itertools.combinations(range(4), 2):
            keep = list(keep)
            x = torch.zeros(4, dtype=DOUBLE)
            x[keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ w[0])
            losses.append(float((x - w[0]) @ H @ (x - w[0])))
        obs, obd = (Surgeon("0.5", compensate=c)(w, Int16(), stats).meta["loss"] for c in (True, False))
        assert min(losses) <= obs * (1 + 1e-3)
        total = {"best": total["best"] + min(losses), "obs": total["obs"] + obs, "obd": total["obd"] + obd}
    assert total["obs"] < 4 / 3 * total["best"] < total["obd"]


def test_greedy_obq_on_four_columns_is_near_the_best_of_all_codes():
    """All codes of 4 columns on 4 levels: greedy OBQ is never better, and near the best in the mean of 40 problems."""
    grid, found, best = Fixed(2, -1, scale="float32"), 0.0, 0.0
    every = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)
    for seed in range(40):
        _, _, stats = problem(out=1, columns=4, seed=seed)
        w = torch.rand(1, 4, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1.5
        H, p = damped(stats.gram), grid.fit(w.float())
        d = grid.decode(every, p).double() - w
        least, own = float(((d @ H) * d).sum(1).min()), float(Exact()(w.float(), grid, stats).meta["loss"])
        assert least <= own * (1 + 1e-6)
        best, found = best + least, found + own
    assert found < 1.5 * best


@pytest.mark.parametrize("sparsity", ["0.5", "2:4", "0.3", "1:2"])
def test_sparse_sweep_is_exact_elimination(sparsity):
    """Masks and compensation column by column with an inverse computed afresh; all in one block."""
    w, _, stats = problem(columns=16)
    w, H, rule = w.double(), damped(stats.gram), Sparsity.parse(sparsity)
    q = Sweep(sparsity=sparsity, importance=False)(w, Int(4, -1, scale="float32"), stats)
    grid, p, x = q.grid, q.params, w.clone()
    pivots = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(16)])
    out = torch.zeros_like(w)
    mask = rule.mask(x.square() / pivots)
    for j in range(16):
        if rule.m and j % rule.m == 0:
            mask[:, j : j + rule.m] = rule.mask(x[:, j : j + rule.m].square() / pivots[j : j + rule.m])
        inv = torch.linalg.inv(H[j:, j:])
        rounded = grid.decode(grid.encode(x, p), p)[:, j].double()
        out[:, j] = torch.where(mask[:, j], 0, rounded)
        x[:, j + 1 :] -= ((x[:, j] - out[:, j]) / inv[0, 0])[:, None] * inv[0, 1:]
    assert torch.equal(q.dense(), out.float())
    E = out - w
    assert q.meta["loss"] == pytest.approx(float(((E @ H) * E).sum()), rel=1e-9)


@pytest.mark.parametrize("solver", [Sweep, Surgeon])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4", "4:8"])
def test_exact_counts(solver, sparsity):
    w, _, stats = problem(out=16, columns=64, tokens=256)
    zeros = solver(sparsity=sparsity)(w, Int16(), stats).dense() == 0
    rule = Sparsity.parse(sparsity)
    if rule.m:
        assert bool((zeros.view(16, -1, rule.m).sum(-1) == rule.n).all())
    else:
        assert int(zeros.sum()) == 16 * 64 // 2


def test_ties_do_not_prune_more():
    stats, w = white(16), torch.ones(4, 16)
    w[:, ::2] = 0
    assert int((Sweep(sparsity="0.25")(w, Int16(), stats).dense() == 0).sum()) == 4 * 8  # they were zero before
    assert int(Sparsity.parse("0.25").mask(w).sum()) == 16


def test_white_inputs_make_all_of_them_magnitude_pruning():
    w, _, _ = problem(out=8, columns=32)
    want = w.abs() > w.abs().flatten().kthvalue(128).values
    for solver in (Sweep(sparsity="0.5"), Surgeon(compensate=False)):
        assert torch.equal(solver(w, Int16(), white(32)).dense() != 0, want)
    rows = w.abs() > w.abs().kthvalue(16, dim=1, keepdim=True).values
    assert torch.equal(Surgeon()(w, Int16(), white(32)).dense() != 0, rows)


def test_sparsity_zero_is_the_sweep():
    w, _, stats = problem()
    a, b = (Sweep(sparsity=s)(w.double(), Int(3, 8), stats) for s in ("", "0"))
    assert torch.equal(a.codes, b.codes)


def test_lossless_data_is_pruned_without_loss():
    """8 inputs of rank 4: half of the weights are free once the other half may move."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=g) @ torch.randn(4, 8, generator=g)
    stats, w = Stats.empty(8), torch.randn(3, 8, generator=g)
    stats.update(x)
    q = Surgeon(damp=1e-7)(w.double(), Int16(), stats)
    assert float((x @ (q.dense() - w).T).square().sum()) < 1e-5 * float((x @ w.T).square().sum())


def test_sweep_beats_magnitude_and_obd_in_outputs():
    total = {"sweep": 0.0, "obs": 0.0, "obd": 0.0, "magnitude": 0.0}
    for seed in range(6):
        w, x, stats = problem(out=16, columns=48, tokens=512, seed=seed)
        found = {"sweep": Sweep(sparsity="0.5"), "obs": Surgeon(), "obd": Surgeon(compensate=False)}
        for k, solver in found.items():
            total[k] += float((x @ (solver(w, Int16(), stats).dense() - w).T).square().sum())
        smallest = Surgeon(compensate=False, curved=False)(w, Int16(), None).dense()
        assert torch.equal(smallest != 0, w.abs() > w.abs().median())
        total["magnitude"] += float((x @ (smallest - w).T).square().sum())
    assert total["obs"] < total["sweep"] < total["obd"] < total["magnitude"]


def test_factor_and_score_are_the_downdated_ones():
    """The score uses U_jj² of the sweep, not the diagonal of the full inverse."""
    _, _, stats = problem(columns=12)
    U, _ = inverse_factor(stats.gram.double(), torch.zeros(12, dtype=torch.bool), 0.01)
    full = torch.linalg.inv(damped(stats.gram)).diagonal()
    assert float((U.diagonal().square() / full).min()) < 0.9


def test_refusals():
    for text in ("1.5", "4:2", "0:4", "half", "1"):
        with pytest.raises(RequestError, match="sparsity"):
            Sparsity.parse(text)
    with pytest.raises(RequestError, match="natural"):
        Sweep(order="activation", sparsity="2:4")
    assert "zero is no number" in Recipe(Learned(3), Sweep(sparsity="0.5")).refusal((8, 16))
    assert "multiples of 4" in Recipe(Int(4, 16), Sweep(sparsity="2:4")).refusal((8, 18))
    assert "multiples of 4" in Recipe(Int(4, 6), Sweep(sparsity="2:4")).refusal((8, 24))
    for grid in (Int(4, 16), Int(2, -1, symmetric=True), Int16(), NAMED_GRIDS["nf4"], NAMED_GRIDS["mxfp4"]):
        assert holds_zero(grid)
    with pytest.raises(RequestError, match="prunes nothing"):
        methods.plan("gptq", None, None, None, sparsity="0.5", format="fewbits")


SMALL = {k: v for k, v in CALIBRATED.items() if k not in ("bits", "group_size")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tiny_model("llama", tmp_path_factory.mktemp("llama"), vocab_size=320)
    tiny_tokenizer(folder, TEXT)
    return folder


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparsegpt", {"sparsity": "2:4"}),
        ("sparsegpt", {"sparsity": "0.5", "grid": "int4", "group_size": 16, "format": "compressed-tensors"}),
        ("obs", {}),
        ("obd", {"sparsity": "0.3"}),
        ("magnitude", {"sparsity": "2:4"}),
    ],
)
def test_whole_models(method, options, llama, tmp_path):
    """Quantize, load, generate; the zeros are in the checkpoint."""
    from fewbits.runtime import decode, load
    from fewbits.runtime.linear import QuantLinear

    out = tmp_path / "out"
    api.quantize(llama, out, method=method, **options, **SMALL)
    model = load(out)[0]
    share = {"2:4": 0.5, "0.3": 0.3}.get(options.get("sparsity", "0.5"), 0.5)
    for layer in (m for m in model.modules() if isinstance(m, QuantLinear)):
        assert float((layer.dequantize() == 0).float().mean()) >= share - 0.02
    assert len(decode.generate(model, torch.tensor([[1, 5, 9]]), 4)) == 4
    events = [json.loads(x) for x in (out / "fewbits_events.jsonl").read_text().splitlines()]
    assert all("fallback" not in e for e in events)
    if "format" in options:  # a format that stores zeros as codes like any other
        assert all(e["bits_per_weight"] >= 4 for e in events if "bits_per_weight" in e)
    else:  # integers of 16 bits, those that are left and a bit for each
        bits = [e["bits_per_weight"] for e in events if "bits_per_weight" in e]
        assert max(bits) <= 1 + 16 * (1 - share) + 32 / 64 + 0.02
