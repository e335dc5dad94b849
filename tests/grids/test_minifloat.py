"""Laws of the floating-point grids, and blocks whose answer a reader can check."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.grids import NAMED_GRIDS, Float, tied
from fewbits.solve import Exact, Nearest, Sweep
from fewbits.stats import Stats

GRIDS = {name: grid for name, grid in NAMED_GRIDS.items() if isinstance(grid, Float)}
PLAIN = [*GRIDS.values(), Float("e2m1", 48, 16), Float("e4m3", -1, 7, "bfloat16"), Float("e3m2", 20, scale="float16")]


def weights(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def through(grid: Float, w: torch.Tensor) -> torch.Tensor:
    p = grid.fit(w)
    return grid.decode(grid.encode(w, p), p)


@pytest.mark.parametrize("grid", PLAIN, ids=str)
def test_laws(grid: Float) -> None:
    """Idempotence; shapes and dtypes; the error is at most half a step of the element at ``w``, clipping apart."""
    w, e = weights(), grid.numbers
    p = grid.fit(w)
    codes = grid.encode(w, p)
    q = grid.decode(codes, p)
    assert codes.dtype == torch.uint8 and int(codes.max()) < grid.levels and bool(torch.isfinite(q).all())
    assert torch.equal(grid.encode(q, p), codes)
    assert p["scale"].dtype == grid.dtype and tuple(p["scale"].shape) == grid.tiles((24, 96))
    step = grid._spread(grid.step(p), grid.index(p, 96), 24)
    inside = (w / step).abs() <= e.max
    spacing = torch.maximum((w / step).abs(), torch.tensor(e.normal)) * 2.0**-e.mantissa
    assert bool(((q - w).abs() <= step * spacing / 2 * (1 + 1e-5))[inside].all())
    assert bool((q.abs() == (step * e.max))[~inside].all())
    bits = grid.bits * w.numel() + sum(8 * t.numel() * t.element_size() for t in p.values())
    assert grid.cost((24, 96)) * w.numel() == pytest.approx(bits)


@pytest.mark.parametrize("name", GRIDS)
def test_symmetry_and_powers_of_two(name: str) -> None:
    """``Q(-w) = -Q(w)`` and ``Q(2^k w) = 2^k Q(w)``, exactly: no stored scale is subnormal here."""
    grid, w = GRIDS[name], weights()
    assert torch.equal(through(grid, -w), -through(grid, w))
    assert torch.equal(through(grid, 8 * w), 8 * through(grid, w))


@pytest.mark.parametrize(
    ("rule", "biased", "decoded"),
    [("floor", 127, 6.0), ("ceil", 128, 8.0), ("rceil", 128, 8.0), ("even", 128, 8.0)],
)
def test_mx_by_hand(rule: str, biased: int, decoded: float) -> None:
    """Block maximum 7 on E2M1. Floor: scale 1, 7 is clipped to 6. The others: scale 2, 7 / 2 = 3.5, a tie → 4 → 8."""
    w = torch.zeros(1, 32)
    w[0, 3] = 7.0
    grid = Float("e2m1", 32, scale="e8m0", rule=rule)
    p = grid.fit(w)
    assert int(p["scale"]) == biased and float(grid.decode(grid.encode(w, p), p)[0, 3]) == decoded


@pytest.mark.parametrize(
    ("absmax", "even", "floor", "ceil", "rceil"),
    [
        (1, 125, 125, 125, 125),
        (1.74, 125, 125, 126, 126),
        (1.75, 126, 125, 126, 126),
        (2, 126, 126, 126, 126),
        (3, 126, 126, 127, 126),
        (3.5, 127, 126, 127, 127),
        (6, 127, 127, 128, 127),
        (7, 128, 127, 128, 128),
        (100, 131, 131, 132, 132),
        (0, 0, 0, 0, 0),
        (2.0**-140, 0, 0, 0, 0),
    ],
)
def test_exponents_of_mxfp4(absmax: float, even: int, floor: int, ceil: int, rceil: int) -> None:
    found = [
        int(Float("e2m1", -1, scale="e8m0", rule=r).fit(torch.tensor([[absmax, 0.0]]))["scale"])
        for r in ("even", "floor", "ceil", "rceil")
    ]
    assert found == [even, floor, ceil, rceil]


def test_exponents_are_exact_at_powers_of_two() -> None:
    """A float logarithm would be off by one just below them."""
    for k in range(-100, 101):
        for x, want in ((2.0**k, k), (float(torch.nextafter(torch.tensor(2.0**k), torch.tensor(0.0))), k - 1)):
            p = Float("e2m1", -1, scale="e8m0", rule="floor").fit(torch.tensor([[x]]))
            assert int(p["scale"]) == want - 2 + 127


def test_nvfp4_by_hand() -> None:
    """A constant tensor comes back exactly. Absmax 3: global 896; a block of absmax 1 gets 149.33 → 144, so that its
    largest is clipped: 6 * 144 / 896 = 0.9643.
    """
    grid = NAMED_GRIDS["nvfp4"]
    ones = torch.ones(2, 32)
    p = grid.fit(ones)
    assert float(p["global"]) == 2688 and p["scale"].float().tolist() == [[448, 448]] * 2
    assert torch.equal(through(grid, ones), ones)
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 16] = 3, 1
    p = grid.fit(w)
    assert float(p["global"]) == 896 and p["scale"].float().tolist() == [[448, 144]]
    q = grid.decode(grid.encode(w, p), p)
    assert float(q[0, 0]) == 3 and float(q[0, 16]) == pytest.approx(6 * 144 / 896)


@pytest.mark.parametrize("name", GRIDS)
def test_zeros_tiny_blocks_and_damage(name: str) -> None:
    grid, w = GRIDS[name], weights(4, 128)
    w[:, 32:64] = 0
    w[:, 64:96] *= 1e-3
    q = through(grid, w)
    assert bool(torch.isfinite(q).all()) and not q[:, 32:64].any()
    assert not through(grid, torch.zeros(3, 64)).any()
    if grid.group in (16, 32):
        assert float((q - w)[:, 64:96].norm() / w[:, 64:96].norm()) < 0.2
    for bad in (math.nan, math.inf):
        w[1, 5] = bad
        with pytest.raises(RequestError, match="not finite"):
            grid.fit(w)


def test_blocks_of_128_with_ragged_edges() -> None:
    """A weight of 130 x 260: four numbers wide, two high; every corner is scaled by its own maximum (DeepSeek)."""
    w, grid = weights(130, 260), GRIDS["fp8-block"]
    p = grid.fit(w)
    assert tuple(p["scale"].shape) == (2, 3)
    for r, rows in enumerate((slice(0, 128), slice(128, 130))):
        for c, columns in enumerate((slice(0, 128), slice(128, 256), slice(256, 260))):
            tile = w[rows, columns]
            assert float(p["scale"][r, c]) == float(tile.abs().max() / 448)
            exact = (tile / p["scale"][r, c]).to(torch.float8_e4m3fn).float() * p["scale"][r, c]
            assert torch.equal(grid.decode(grid.encode(w, p), p)[rows, columns], exact)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Float("e2m1", 32, scale="e8m0", rule="floor"), 0.0132),
        (Float("e2m1", 32, scale="e8m0", rule="rceil"), 0.0133),
        (Float("e2m1", 32, scale="e8m0", rule="even"), 0.0129),
        (Float("e2m1", 32, scale="e8m0", rule="ceil"), 0.0208),
        (Float("e2m1", 16, scale="e4m3"), 0.0091),
        (Float("e2m1", 64), 0.0112),
        (Float("e2m1", 32), 0.0103),
    ],
    ids=str,
)
def test_error_on_a_gaussian(grid: Float, expected: float) -> None:
    """Squared error on N(0, 1) of published conventions, within 4%."""
    w = weights(2000, 128)
    assert float((through(grid, w) - w).square().mean()) == pytest.approx(expected, rel=0.04)


def test_searches_lower_the_error() -> None:
    w = weights(500, 128)
    for grid, expected in ((NAMED_GRIDS["mxfp4"], 0.0124), (NAMED_GRIDS["nvfp4"], 0.0071)):
        found = through(dataclasses.replace(grid, ratios=grid.search), w)
        assert float((found - w).square().mean()) == pytest.approx(expected, rel=0.05)
    row = weights(1, 64)
    big = int(row.abs().argmax())
    importance = torch.full((64,), 1e-6)
    importance[big] = 1
    grid = dataclasses.replace(NAMED_GRIDS["fp4-e2m1"], ratios=NAMED_GRIDS["fp4-e2m1"].search)
    held = grid.fit(row, importance)
    assert float((grid.decode(grid.encode(row, held), held) - row)[0, big].abs()) <= float(
        (through(grid, row) - row)[0, big].abs()
    )


def test_quantile_takes_the_place_of_the_maximum() -> None:
    w = weights(4, 100)
    p = dataclasses.replace(NAMED_GRIDS["fp8"], quantile=0.9).fit(w)
    assert torch.equal(p["scale"], (w.abs().sort(1).values[:, 89:90] / 448))


def test_tied_weights_share_their_global() -> None:
    grid, parts = NAMED_GRIDS["nvfp4"], [weights(8, 32, s) * (s + 1) for s in range(3)]
    shared = tied(grid, parts)
    found = [shared.fit(w)["global"] for w in parts]
    assert torch.equal(found[0], found[2]) and torch.equal(found[0], grid.fit(torch.cat(parts))["global"])
    assert shared == grid and hash(shared) == hash(grid)
    assert tied(NAMED_GRIDS["fp8"], parts) is NAMED_GRIDS["fp8"]


def correlated(columns: int) -> Stats:
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(9))
    stats = Stats.empty(columns)
    stats.update(weights(4 * columns, columns, 8) @ (mix / columns**0.5 + torch.eye(columns)))
    return stats


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "mxfp4", "nvfp4", "fp4-e2m1", "fp4-e3m0", "mxfp6"])
def test_sweep_is_exact_elimination_in_order(name: str) -> None:
    """GPTQ on a floating-point grid equals OBQ in the order of the columns, in float64."""
    w, stats, grid = weights(8, 64).double(), correlated(64), GRIDS[name]
    swept = Sweep(static=True, importance=False)(w, grid, stats)
    exact = Exact(greedy=False)(w, grid, stats)
    assert torch.equal(swept.codes, exact.codes)
    assert torch.allclose(swept.dense(), exact.dense(), rtol=0, atol=1e-10)
    assert swept.meta["loss"] == pytest.approx(exact.meta["loss"], rel=1e-10)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8", "fp8-block"])
@pytest.mark.parametrize(
    "solver", [Sweep(), Sweep(order="activation", static=True), Sweep(order="activation")], ids=str
)
def test_sweep_lowers_the_output_error(name: str, solver: Sweep) -> None:
    """Both sides of the trade: outputs better than rounding, weights worse; groups fitted on the way and scattered."""
    w, stats, grid = weights(32, 96), correlated(96), GRIDS[name]

    def loss(q: torch.Tensor) -> float:
        return float(((q - w) @ stats.gram * (q - w)).sum())

    near, swept = Nearest()(w, grid, None).dense(), solver(w, grid, stats).dense()
    assert loss(swept) < loss(near) and float((swept - w).norm()) > float((near - w).norm())


@pytest.mark.parametrize(
    "bad", [{"element": "e9m9"}, {"scale": "e5m2"}, {"rule": "mse"}, {"group": 0}, {"rows": -2}, {"quantile": 0.0}]
)
def test_impossible_grids_are_refused(bad: dict) -> None:
    with pytest.raises(RequestError, match=r"allowed|give"):
        Float(**bad)
