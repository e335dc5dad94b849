"""AWQ's search: what the paper's construction promises, and the gains that synthetic problems have."""

import pytest
import torch

from fewbits.grids import Int
from fewbits.stats import Stats, loss
from fewbits.transform import Awq, Diagonal


def problem(scales, out=256, columns=512, tokens=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g) * scales
    stats = Stats.empty(columns)
    stats.update(x)
    return torch.randn(out, columns, generator=g) * 0.02, x, stats


def rounded(w, grid, s):
    p = grid.fit(w * s)
    return grid.decode(grid.encode(w * s, p), p) / s


SCALES = {
    "even": (torch.ones(512), 0.98, 1.0),
    "one channel x50": (torch.ones(512).index_fill(0, torch.tensor([100]), 50.0), 0.2, 0.34),
    "every 64th x50": (torch.ones(512).index_fill(0, torch.arange(0, 512, 64), 50.0), 0.15, 0.24),
    "lognormal": (torch.randn(512, generator=torch.Generator().manual_seed(9)).exp(), 0.5, 0.7),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("bits", [3, 4])
def test_gain_on_synthetic_channels(name, bits):
    """Loss relative to plain rounding: iid 1.0, one loud channel .28-.31, every 64th .19-.21, lognormal .60-.68."""
    scales, low, high = SCALES[name]
    w, _, stats = problem(scales)
    grid = Int(bits, 128, scale="float32")
    s = Awq().fit([(w, stats)], grid).s
    ratio = loss(rounded(w, grid, s) - w, stats.gram) / loss(rounded(w, grid, torch.ones(512)) - w, stats.gram)
    assert low <= float(ratio) <= high * (1 + 1e-6)


def test_normalised_and_blind_to_the_units_of_the_activations():
    w, x, stats = problem(SCALES["lognormal"][0])
    louder = Stats.empty(512)
    louder.update(x * 1024)
    a, b = Awq().fit([(w, stats)], Int(4, 128)).s, Awq().fit([(w, louder)], Int(4, 128)).s
    assert float(a.max() * a.min()) == pytest.approx(1, rel=1e-5)
    assert torch.allclose(a, b, rtol=1e-4)


def test_never_worse_than_rounding():
    for seed in range(5):
        w, _, stats = problem(torch.rand(512) + 0.5, out=32, seed=seed)
        grid = Int(4, 64)
        s = Awq().fit([(w, stats)], grid).s
        assert loss(rounded(w, grid, s) - w, stats.gram) <= loss(rounded(w, grid, torch.ones(512)) - w, stats.gram)


def test_loss_from_the_gram_is_the_loss_of_the_outputs():
    w, x, stats = problem(SCALES["lognormal"][0], out=16)
    error = rounded(w, Int(3, 128), torch.ones(512)) - w
    assert float(loss(error, stats.gram)) == pytest.approx(float((x @ error.T).square().sum()), rel=1e-4)


def test_shared_channels_get_one_factor():
    w, _, stats = problem(SCALES["lognormal"][0], out=16)
    share = torch.arange(512) % 128
    s = Awq().fit([(w, stats)], Int(4, 128), share).s
    assert torch.equal(s, s[:128].repeat(4))


def test_consumers_of_different_inputs():
    """Experts: one scale for all, each weighed by what it saw."""
    (w1, _, s1), (w2, _, s2) = problem(SCALES["lognormal"][0], out=16), problem(torch.ones(512), out=8, seed=1)
    s = Awq().fit([(w1, s1), (w2, s2)], Int(4, 128)).s
    grid, one = Int(4, 128), torch.ones(512)

    def total(s):
        return sum(float(loss(rounded(w, grid, s) - w, t.gram)) for w, t in ((w1, s1), (w2, s2)))

    assert total(s) <= total(one)


def test_silent_channels_and_tiny_weights_stay_finite():
    w, _, stats = problem(torch.ones(512).index_fill(0, torch.arange(64), 0.0))
    w[:, 128:256] = 0
    assert torch.isfinite(Awq().fit([(w, stats)], Int(4, 128)).s).all()


def test_map_and_its_statistics():
    """The map preserves the product, and moves the statistics as recomputing them would."""
    w, x, stats = problem(SCALES["lognormal"][0], out=8)
    m = Diagonal(torch.rand(512) + 0.5)
    v = torch.randn(512, 32)
    h = torch.randn(20, 32)
    assert torch.allclose((h @ m.producer(v).T) @ m.consumer(w).T, (h @ v.T) @ w.T, rtol=1e-3, atol=1e-3)
    again = Stats.empty(512)
    again.update(x / m.s)
    moved = m.stats(stats)
    assert torch.allclose(moved.gram, again.gram, rtol=1e-3, atol=1e-2)
    assert torch.allclose(moved.absmean, again.absmean, rtol=1e-4)
    assert torch.allclose(moved.absmax, again.absmax, rtol=1e-5)
