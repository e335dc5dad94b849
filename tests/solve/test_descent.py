"""Coordinate descent: a pass is the loop over columns, the loss never grows, the end is a coordinate optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.grids import Block, Int
from fewbits.plan import from_data, to_data
from fewbits.solve import Descent, Sweep
from fewbits.solve.descent import descend
from fewbits.stats import Stats, loss
from fewbits.tensor import Quantized


def correlated(columns: int, tokens: int = 400) -> Stats:
    x = torch.randn(tokens, columns) @ (torch.randn(columns, columns) * 0.3 + torch.eye(columns))
    stats = Stats.empty(columns)
    stats.update(x)
    return stats


def plainly(w: Tensor, q: Quantized, H: Tensor, passes: int) -> Tensor:
    """Column by column: the nearest code to the minimum of the loss in that column, the others as they are."""
    codes = q.codes.clone()
    for _ in range(passes):
        for k in range(w.shape[1]):
            E = q.grid.decode(codes, q.params).to(w.dtype) - w
            target = w[:, k] - (E @ H[:, k] - E[:, k] * H[k, k]) / H[k, k]
            full = w.clone()
            full[:, k] = target
            codes[:, k] = q.grid.encode(full, q.params)[:, k]
    return codes


@pytest.mark.parametrize(
    "grid", [Int(3, 16), Int(2, -1, symmetric=True), Block("q4_0"), Block("q5_1"), Block("iq4_nl")]
)
def test_a_pass_is_the_loop_over_columns(grid):
    torch.manual_seed(0)
    w, H = torch.randn(8, 64, dtype=torch.float64), correlated(64).gram.double()
    p = grid.fit(w.float())
    q = Quantized(grid, grid.encode(w.float(), p), p)
    for passes in (1, 3):
        same = descend(w, q, H, passes) == plainly(w, q, H, passes)
        assert same.float().mean() > 0.998  # a tie in float32 may fall the other way


@pytest.mark.parametrize("start", [Sweep(), Sweep(order="activation", static=True), Sweep(order="activation")])
@pytest.mark.parametrize("grid", [Int(3, 32), Block("q4_0")])
def test_the_loss_never_grows(grid, start):
    torch.manual_seed(1)
    w, stats = torch.randn(16, 128), correlated(128)
    H = stats.gram.clone()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    found = [start(w, grid, stats)] + [Descent(k, start)(w, grid, stats) for k in (1, 2, 4)]
    losses = [float(loss(q.dense() - w, H)) for q in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(q.params[k], found[0].params[k]) for q in found for k in q.params)


def test_the_end_is_a_coordinate_optimum():
    torch.manual_seed(2)
    grid, w, H = Int(2, -1), torch.randn(4, 12, dtype=torch.float64), correlated(12).gram.double()
    p = grid.fit(w.float())
    q = Quantized(grid, grid.encode(w.float(), p), p)
    best = descend(w, q, H, 20)
    value = lambda codes: ((E := grid.decode(codes, p).double() - w) @ H * E).sum(1)  # noqa: E731
    least = value(best)
    for column in range(12):
        for code in range(4):
            other = best.clone()
            other[:, column] = code
            assert bool((value(other) >= least * (1 - 1e-6)).all())


def test_channels_never_seen_keep_their_codes():
    torch.manual_seed(3)
    w, stats = torch.randn(8, 64), correlated(64)
    stats.gram[5], stats.gram[:, 5] = 0, 0
    start = Sweep(order="activation", static=True)
    first, then = start(w, Int(3, 32), stats), Descent(3, start)(w, Int(3, 32), stats)
    assert torch.equal(first.codes[:, 5], then.codes[:, 5]) and not torch.equal(first.codes, then.codes)


def test_it_is_data_and_needs_statistics():
    solver = Descent(2, Sweep(damp=0.02))
    assert from_data(to_data(solver)) == solver and solver.needs == {"gram"}
    with pytest.raises(RequestError, match="coordinate descent needs the gram matrix"):
        solver(torch.zeros(2, 32), Int(4, 32), None)
