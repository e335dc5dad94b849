"""Tables against derivations, published figures and examples; laws of blocks, double quantization and sweep."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.grids import NAMED_GRIDS, Int, Table, Vectorwise, base, group_index
from fewbits.grids.codebook import CODEBOOKS, codebook, fp4, nf4, normal_float
from fewbits.grids.double import compress, dynamic_map, expand
from fewbits.methods import plan
from fewbits.solve import Exact, Nearest, Sweep
from fewbits.stats import Stats
from fewbits.tensor import Quantized


def weights(rows: int = 24, columns: int = 192, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def observed(columns: int, seed: int = 1) -> Stats:
    stats = Stats.empty(columns, frozenset({"gram"}))
    mix = weights(columns, columns, seed + 1) / columns**0.5
    stats.update(weights(4 * columns, columns, seed) @ (mix + torch.eye(columns)))
    return stats


def test_nf4_is_its_derivation() -> None:
    values = nf4()
    assert torch.allclose(values.double(), normal_float(), rtol=0, atol=2e-7)
    assert values[0] == -1 and values[-1] == 1 and int((values == 0).sum()) == 1 and bool((values.diff() > 0).all())


def test_thresholds_of_nf4() -> None:
    expected = [-0.8480963707, -0.6106328964, -0.4599952698, -0.3396794200, -0.2346073985, -0.1379117370, -0.0455250181]
    expected += [0.0397901498, 0.1202552468, 0.2035212517, 0.2920137644, 0.3893125355, 0.5016634464, 0.6427869201]
    assert codebook("nf4").thresholds.tolist() == pytest.approx([*expected, 0.8614784479], abs=1e-10)


def test_fp4_by_code() -> None:
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert torch.equal(fp4(), torch.tensor([*magnitudes, *(0 - m for m in magnitudes)]) / 12)
    assert codebook("fp4").order.tolist() == [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_code_and_every_tie(name: str) -> None:
    book = codebook(name)
    unique = book.values[book.order.long()]
    assert torch.equal(book.lookup(book.nearest(unique)), unique)
    for i, t in enumerate(book.thresholds):
        below, above = torch.nextafter(t, torch.tensor(-2.0)), torch.nextafter(t, torch.tensor(2.0))
        assert book.nearest(torch.stack([below, t, above])).tolist() == [
            *book.order[[i, i]].tolist(),
            int(book.order[i + 1]),
        ]


def test_example_by_hand() -> None:
    """0.5 lies below the threshold 0.50166."""
    w = torch.zeros(1, 64)
    w[0, :8] = torch.tensor([-1, -0.7, 0, 0.08, 1, 0.5, 0.3, -0.3])
    grid = Table("nf4", 64)
    p = grid.fit(w)
    assert p["absmax"].tolist() == [[1.0]] and grid.encode(w, p)[0, :9].tolist() == [0, 1, 7, 8, 15, 12, 11, 4, 7]


SHAPES = [(24, 192), (5, 100), (7, 33), (1, 130), (64, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "group"), list(itertools.product(CODEBOOKS, (32, 64, 256, -1))))
def test_laws(name: str, group: int, shape: tuple[int, int]) -> None:
    """Idempotence, the block's largest kept exactly, nearest by exhaustion."""
    grid, w = Table(name, group), weights(*shape)
    p = grid.fit(w)
    codes = grid.encode(w, p)
    q = grid.decode(codes, p)
    assert codes.dtype == torch.uint8 and q.shape == w.shape and p["absmax"].shape == grid.blocks(shape)
    assert torch.equal(grid.fit(q)["absmax"], p["absmax"])
    assert torch.equal(grid.decode(grid.encode(q, p), p), q)
    size = shape[1] if group == -1 else group
    for a, b in zip(w.reshape(-1).split(size), q.reshape(-1).split(size), strict=True):
        exact = (
            a[:, None] - fp4()[None] * a.abs().max() if name == "fp4" else a[:, None] - nf4() * a.abs().max()
        ).abs()
        assert torch.allclose((a - b).abs(), exact.amin(1), atol=1e-6) and b.abs().max() == a.abs().max()


def test_blocks_that_straddle_rows_are_blocks_of_the_flat_weight() -> None:
    w = weights(6, 100)
    ragged, flat = Table("nf4", 64), w.reshape(1, -1)
    p, f = ragged.fit(w), ragged.fit(flat)
    assert ragged.straddles((6, 100)) and p["absmax"].shape == (10,) and f["absmax"].shape == (1, 10)
    assert torch.equal(ragged.decode(ragged.encode(w, p), p).reshape(1, -1), ragged.decode(ragged.encode(flat, f), f))


def test_zeros() -> None:
    w = torch.zeros(3, 128)
    w[2] = torch.full((128,), 1e-30)
    own = (g for g in NAMED_GRIDS.values() if isinstance(g, (Table, Vectorwise)))
    for grid in (*own, Table("nf4", 100)):
        q = Nearest()(w, grid, None).dense()
        assert torch.isfinite(q).all() and not q[:2].any()
    assert Nearest()(w, Table("nf4"), None).codes[0, 0] == 7


@pytest.mark.parametrize("shape", [(24, 192), (6, 100)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_factor_of_a_maximum_is_much_better(shape: tuple[int, int], weighted: bool) -> None:
    """By exhaustion, block by block of the flattened weight."""
    w, plain = weights(*shape), Table("nf4", 64)
    importance = weights(1, shape[1], 3)[0].exp() if weighted else None
    found = dataclasses.replace(plain, ratios=plain.search).fit(w, importance)["absmax"].reshape(-1)
    share = (torch.ones(shape[1]) if importance is None else importance).expand(shape).reshape(-1)
    for block, weight, absmax in zip(w.reshape(-1).split(64), share.split(64), found, strict=True):

        def error(m: torch.Tensor, block: torch.Tensor = block, weight: torch.Tensor = weight) -> float:
            return float(((block[:, None] - nf4() * m).square().amin(1) * weight).sum())

        candidates = [block.abs().max() * r for _, r in plain.search]
        assert any(torch.equal(absmax, c) for c in candidates)
        assert error(absmax) <= min(map(error, candidates)) * 1.01


def test_methods_that_search_search_maxima_too() -> None:
    """A Gaussian weight gains an eighth; what bitsandbytes writes stays as it is."""
    w = weights(200, 512)
    errors = {}
    for name in ("rtn", "rtn-clip"):
        grid = plan(name, None, None, None, "nf4-dq", format="bitsandbytes").rules[0].recipe.grid
        errors[name] = float((Nearest()(w, grid, None).dense() - w).square().mean())
    assert errors["rtn-clip"] < 0.89 * errors["rtn"]
    for name in ("gptq", "awq", "awq+gptq"):
        grid = plan(name, None, None, None, "nf4", format="bitsandbytes").rules[0].recipe.grid
        assert grid.ratios == grid.search  # type: ignore[attr-defined]
    assert plan("nf4", None, None, None, format="bitsandbytes").rules[0].recipe.grid == Table("nf4", 64)


@pytest.mark.parametrize(("name", "expected"), [("nf4", 0.00846), ("fp4", 0.0149)])
def test_error_on_a_gaussian(name: str, expected: float) -> None:
    w, grid = weights(2000, 512), Table(name, 64)
    error = (Nearest()(w, grid, None).dense() - w).square().mean()
    assert float(error) == pytest.approx(expected, rel=0.02)


def test_the_dynamic_map() -> None:
    values = dynamic_map().values
    assert len(values.unique()) == 256 and bool((values.diff() > 0).all()) and (values == 0).sum() == 1
    assert values[-1] == 1 and [float(values[i]) for i in (0, -2)] == pytest.approx([-0.99297, 0.99297], abs=1e-5)
    assert float(values[values > 0].min()) == pytest.approx(5.5e-7)


def test_double_quantization() -> None:
    w, plain, nested = weights(96, 512), Table("nf4", 64), Table("nf4", 64, nested=True)
    a, b = Nearest()(w, plain, None), Nearest()(w, nested, None)
    assert torch.equal(a.codes, b.codes)  # codes are chosen with the exact maxima
    assert {k: (t.dtype, tuple(t.shape)) for k, t in b.params.items()} == {
        "absmax": (torch.uint8, (96, 8)),
        "nested": (torch.float32, (3,)),
        "offset": (torch.float32, (1,)),
    }
    exact, found = a.params["absmax"], nested.absmax(b.params)
    assert float((found - exact).norm() / exact.norm()) < 0.01
    errors = [float((q.dense() - w).square().mean()) for q in (a, b)]
    assert errors[0] < errors[1] < 1.01 * errors[0]
    assert nested.settle(b.params) is b.params and Quantized(nested, b.codes, b.params).params is b.params


def test_compress_is_within_half_a_step_and_a_lattice_point() -> None:
    absmax = weights(1, 1000).abs() + 1
    p = compress(absmax)
    centred = (absmax - p["offset"]).reshape(-1)
    nested = p["nested"].repeat_interleave(256)[:1000]
    map_ = dynamic_map().values
    nearest = (centred[:, None] / nested[:, None] - map_[None]).abs().amin(1)
    assert bool(((expand(p).reshape(-1) - absmax.reshape(-1)).abs() <= nested * (nearest + 4e-5)).all())
    assert not compress(torch.zeros(2, 3))["absmax"].any()  # bitsandbytes' CPU code gives an all-zero block code 0


def test_cost() -> None:
    shape = (4096, 4096)
    assert Table("nf4", 64).cost(shape) == 4.5
    assert Table("nf4", 64, nested=True).cost(shape) == pytest.approx(4.127, abs=1e-4)
    assert Table("nf4", 64).cost((3, 50)) == 4 + 32 * 3 / 150
    assert Table("nf4", -1).cost((3, 50)) == 4 + 32 / 50
    assert Vectorwise().cost((10, 64)) == 8.5


@pytest.mark.parametrize("grid", [Table("nf4", 32), Table("fp4", 64), Vectorwise()], ids=str)
def test_feedback_is_the_reference(grid: Table | Vectorwise) -> None:
    w = weights(16, 128)
    u = torch.linalg.cholesky(observed(128).gram.inverse(), upper=True)
    p, index = grid.fit(w), group_index(128, grid.period)
    a, b = w.clone(), w.clone()
    for mine, spec in zip(grid.feedback(a, u, p, index), base.feedback(grid, b, u, p, index), strict=True):
        assert torch.equal(mine, spec)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "solver", [Sweep(), Sweep(order="activation", static=True), Sweep(order="activation")], ids=str
)
@pytest.mark.parametrize("grid", [Table("nf4", 32), Table("fp4", 64, nested=True), Vectorwise()], ids=str)
def test_gptq_lowers_the_output_error(grid: Table | Vectorwise, solver: Sweep) -> None:
    w, stats = weights(32, 128), observed(128)

    def loss(q: Quantized) -> float:
        e = q.dense() - w
        return float(((e @ stats.gram) * e).sum())

    swept = solver(w, grid, stats)
    assert loss(swept) < 0.9 * loss(Nearest()(w, grid, None))
    if not getattr(grid, "nested", False):
        assert swept.meta["loss"] == pytest.approx(loss(swept), rel=0.1)  # the difference is the damping


def test_the_sweep_is_exact_elimination() -> None:
    w, stats, grid = weights(4, 32), observed(32), Table("nf4", 16)
    swept = Sweep(static=True)(w.double(), grid, stats)
    assert torch.equal(swept.codes, Exact(greedy=False)(w, grid, stats).codes)


@pytest.mark.parametrize("solver", [Sweep(static=True), Sweep(), Exact()], ids=str)
def test_columns_of_straddling_blocks_are_refused(solver: Sweep | Exact) -> None:
    with pytest.raises(RequestError, match=r"straddle rows|does not fit|uneven"):
        solver(weights(8, 100), Table("nf4", 64), observed(100))


def test_vectorwise_is_the_papers_and_an_integer_grid() -> None:
    """LLM.int8()'s example: [[1, -2, 3], [4, 0.5, -1]] has maxima 3, 4 and codes [[42, -85, 127], [127, 16, -32]]."""
    grid, w = Vectorwise(), torch.tensor([[1.0, -2, 3], [4, 0.5, -1], [0, 0, 0]])
    p = grid.fit(w)
    codes = grid.encode(w, p)
    assert p["absmax"].tolist() == [[3.0], [4.0], [0.0]]
    assert (codes.int() - 128).tolist() == [[42, -85, 127], [127, 16, -32], [0, 0, 0]]
    q = Nearest()(weights(), grid, None)
    integer, params = grid.uniform(q.params)
    assert integer == Int(8, -1, symmetric=True, scale="float32")
    assert torch.equal(Quantized(integer, q.codes, params).dense(), q.dense())
    assert bool(((q.dense() - weights()).abs() <= q.params["absmax"] / 254 * 1.05).all())  # half a step, and float16
    assert bool(((q.codes.int() - 128).abs().amax(1) == 127).all())


@pytest.mark.parametrize("bad", [{"codebook": "nf5"}, {"group": 0}, {"group": -2}])
def test_impossible_tables_are_refused(bad: dict) -> None:
    with pytest.raises(RequestError, match=r"allowed|give"):
        Table(**bad)
