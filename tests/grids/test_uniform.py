"""Laws of the integer grid, and figures that a reader can check (sheet-independent: the formulas are in the module)."""

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.grids import Int, clip_ratios, groups_of


def weights(rows=24, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


GRIDS = [
    Int(b, g, symmetric=s, scale=d)
    for b in (2, 3, 4, 8)
    for g in (-1, 32, 40)
    for s in (True, False)
    for d in ("float16", "bfloat16", "float32")
]


@pytest.mark.parametrize("grid", GRIDS)
def test_laws(grid):
    """Idempotence, integers in range, error at most half a step plus what rounding the scale costs at the ends."""
    w = weights()
    p = grid.fit(w)
    codes = grid.encode(w, p)
    q = grid.decode(codes, p)
    assert codes.dtype == torch.uint8 and int(codes.max()) <= grid.qmax
    assert torch.equal(grid.encode(q, p), codes)
    assert p["scale"].dtype == grid.dtype and p["scale"].shape == (24, groups_of(96, grid.group))
    step = p["scale"].float()[:, grid.index(p, 96)]
    slack = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-23}[grid.scale] * (grid.qmax + 1)
    assert bool(((q - w).abs() <= step * (0.5 + slack) * (1 + 1e-5)).all())


def test_example_by_hand():
    """4 bits, x = [-1, 0, 0.5, 2]: affine scale 0.2, zero 5, codes 0 5 7 15; symmetric scale 4/15, codes 4 8 10 15."""
    x = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    grid = Int(4, -1, scale="float32")
    p = grid.fit(x)
    assert p["scale"].item() == pytest.approx(0.2) and p["zero"].item() == 5
    # 0.5 / 0.2 is a tie in exact arithmetic; float32 division decides it
    assert grid.encode(x, p).tolist()[0][:2] == [0, 5] and grid.encode(x, p)[0, 3] == 15
    sym = Int(4, -1, symmetric=True, scale="float32")
    p = sym.fit(x)
    assert p["scale"].item() == pytest.approx(4 / 15)
    assert sym.encode(x, p).tolist() == [[4, 8, 10, 15]]


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [
        (4, False, 1.012e-2),
        (4, True, 1.227e-2),
        (3, False, 4.65e-2),
        (3, True, 5.63e-2),
        (2, False, 0.253),
        (2, True, 0.302),
    ],
)
def test_error_on_a_gaussian(bits, symmetric, expected):
    """Relative squared error on N(0, 1), groups of 128: published figures of the conventions used here, within 2%."""
    w = weights(2000, 128)
    grid = Int(bits, 128, symmetric=symmetric, scale="float32")
    p = grid.fit(w)
    error = (grid.decode(grid.encode(w, p), p) - w).square().sum() / w.square().sum()
    assert float(error) == pytest.approx(expected, rel=0.02)


def test_clipping_search_finds_the_published_gain():
    """2 bits: the search halves the error (0.253 to about 0.138 with fine steps); at 8 bits it gains nothing."""
    w = weights(1000, 128)

    def error(bits, ratios):
        grid = Int(bits, 128, scale="float32", ratios=ratios)
        p = grid.fit(w)
        return float((grid.decode(grid.encode(w, p), p) - w).square().sum() / w.square().sum())

    assert error(2, clip_ratios(0.2, 80)) == pytest.approx(0.138, rel=0.03)
    assert error(4, clip_ratios(0.2, 80)) == pytest.approx(9.08e-3, rel=0.03)
    assert error(8, clip_ratios(0.2, 80)) == pytest.approx(error(8, clip_ratios(1, 1)), rel=0.03)
    assert error(3, clip_ratios(0.5, 8, independent=True)) < error(3, clip_ratios(0.5, 8))


def test_zero_and_constants():
    grid = Int(4, -1)
    w = torch.stack([torch.zeros(8), torch.full((8,), 3.0), torch.full((8,), -3.0), torch.tensor([0.0] * 7 + [1e-9])])
    p = grid.fit(w)
    q = grid.decode(grid.encode(w, p), p)
    assert torch.isfinite(q).all() and not q[0].any()
    assert torch.allclose(q[1:3], w[1:3], rtol=2e-3)
    assert torch.equal(q[3, :7], torch.zeros(7))


def test_equivariance():
    """Powers of two pass through exactly; negation does not on the full-range symmetric grid (-8 to 7)."""
    w, grid = weights(), Int(4, 32, scale="float32")
    p, p2 = grid.fit(w), grid.fit(w * 4)
    assert torch.equal(grid.decode(grid.encode(w, p), p) * 4, grid.decode(grid.encode(w * 4, p2), p2))
    sym = Int(4, 32, symmetric=True, scale="float32")
    p = sym.fit(w)
    a, b = (sym.decode(sym.encode(x, p), p) for x in (w, -w))
    assert not torch.equal(a, -b)


def test_granularity_is_the_shape_of_the_scale():
    w = weights(8, 64)
    tensor, row, group = Int(4, -1, rows=-1), Int(4, -1), Int(4, 16)
    assert [tuple(g.fit(w)["scale"].shape) for g in (tensor, row, group)] == [(1, 1), (8, 1), (8, 4)]
    errors = [float((g.decode(g.encode(w, p), p) - w).square().sum()) for g in (tensor, row, group) if (p := g.fit(w))]
    assert errors[0] > errors[1] > errors[2]
    whole = Int(4, 64)
    assert torch.equal(whole.fit(w)["scale"], row.fit(w)["scale"])
    tile = Int(4, 16, rows=4).fit(w)["scale"]
    flat = Int(4, -1).fit(w.reshape(2, 4, 4, 16).permute(0, 2, 1, 3).reshape(8, 64))["scale"]
    assert torch.equal(tile, flat.view(2, 4))


def test_importance_moves_the_clipping():
    """What matters is kept: with all importance on the largest weight, no clipping is chosen."""
    w = weights(1, 64)
    big = int(w.abs().argmax())
    importance = torch.full((64,), 1e-6)
    importance[big] = 1.0
    grid = Int(3, -1, symmetric=True, scale="float32", ratios=clip_ratios(0.4, 30))
    free, held = grid.fit(w), grid.fit(w, importance)
    error = [float((grid.decode(grid.encode(w, p), p) - w)[0, big].abs()) for p in (free, held)]
    assert error[1] < error[0]


def test_cost_counts_everything():
    assert Int(4, 128).cost((64, 256)) == pytest.approx(4 + 20 / 128)
    assert Int(4, 128, symmetric=True).cost((64, 256)) == pytest.approx(4 + 16 / 128)
    assert Int(3, 128).cost((64, 256)) == pytest.approx(3 + 19 / 128)
    assert Int(4, 128).cost((10, 576)) == pytest.approx(4 + 5 * 20 / 576)
    assert Int(8, -1, rows=-1, scale="float32").cost((10, 10)) == pytest.approx(8 + 40 / 100)


@pytest.mark.parametrize("bad", [{"bits": 1}, {"bits": 9}, {"group": 0}, {"scale": "float8"}])
def test_impossible_grids_are_refused(bad):
    with pytest.raises(RequestError, match=r"allowed|give"):
        Int(**bad)
