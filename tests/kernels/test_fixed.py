"""Fixed-point products: C++ against the specification in plain torch and against float64, and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fewbits import kernels, stats
from fewbits.errors import RequestError
from fewbits.grids import Int
from fewbits.kernels import fixed, reference
from fewbits.solve import Sweep


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tokens", "n", "m"), [(1, 1, 1), (48, 128, 48), (50, 576, 49), (97, 130, 200), (300, 64, 47)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_the_specification(isa, tokens, n, m, biased):
    x, w, bias = make(tokens, n), make(m, n, seed=1), make(m, seed=2) if biased else None
    got = fixed.fixed_linear(x, w, bias)
    exact = reference.fixed_point(x).double() @ reference.fixed_point(w).double().T
    exact = exact if bias is None else exact + bias
    assert torch.allclose(got.double(), exact, rtol=0, atol=2e-6 * n**0.5 * 3)


def test_sums_of_codes_are_exact_up_to_the_edge_of_32_bits(isa):
    """Rows whose largest value is 4095 steps lose nothing; each run's sum is rounded once, to float32."""
    x = torch.full((48, 256), 4095.0)
    run = torch.tensor(128 * 4095.0**2, dtype=torch.float64).float()
    assert torch.equal(fixed.fixed_linear(x, x), (run + run).expand(48, 48))
    x[:, ::2], x[:, 3] = -4095.0, 17.0
    w = torch.randint(-100, 101, (5, 256), generator=torch.Generator().manual_seed(0)).float()
    w[:, 0] = w[:, 128] = 4095.0
    runs = (x.double().view(48, 1, 2, 128) * w.double().view(1, 5, 2, 128)).sum(-1).float()
    assert torch.equal(fixed.fixed_linear(x, w), runs[..., 0] + runs[..., 1])


def test_error_is_that_of_half_steps(isa):
    """Rounding errors are uniform within half a step of each run's largest value, and independent."""
    x, w = make(512, 1024), make(512, 1024, seed=1)
    error = fixed.fixed_linear(x, w).double() - x.double() @ w.double().T
    step = (x.abs().view(512, 8, 128).amax(-1).square().mean() / 4095**2 / 12 * 2) ** 0.5
    assert 0.9 < float(error.std() / (step * 1024**0.5)) < 1.1
    assert float(error.std()) < 0.1 * float(
        (F.linear(x.bfloat16(), w.bfloat16()).double() - x.double() @ w.double().T).std()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(isa, bad):
    x, w = make(60, 200), make(10, 200, seed=1)
    x[7, 150] = bad
    out = fixed.fixed_linear(x, w)
    assert out[7].isnan().all() and out[:7].isfinite().all() and out[8:].isfinite().all()
    G = torch.zeros(200, 200)
    fixed.fixed_gram_(G, x)
    assert G[150].isnan().all() and G[:150, :150].isfinite().all()


def test_nothing_and_next_to_nothing(isa):
    assert torch.equal(fixed.fixed_linear(torch.zeros(40, 10), make(3, 10)), torch.zeros(40, 3))
    assert torch.equal(fixed.fixed_linear(torch.full((40, 10), 1e-40), make(3, 10)), torch.zeros(40, 3))
    assert fixed.fixed_linear(torch.zeros(0, 10), make(3, 10)).shape == (0, 3)
    assert torch.equal(fixed.fixed_linear(torch.zeros(2, 0), torch.zeros(3, 0), torch.ones(3)), torch.ones(2, 3))


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (128, 48), (127, 50), (1000, 130)])
def test_gram_is_the_specification(isa, rows, n):
    x = make(rows, n)
    G = torch.eye(n)
    fixed.fixed_gram_(G, x)
    rounded = reference.fixed_point(x.T).double()
    assert torch.allclose(G.double(), torch.eye(n).double() + rounded @ rounded.T, rtol=1e-5, atol=1e-5 * rows**0.5)
    assert torch.equal(G, G.T)


SHAPES = [(1, 1, 1), (128, 48, 48), (127, 50, 50), (1000, 130, 130), (130, 49, 500), (130, 500, 49), (300, 1, 97)]


@pytest.mark.parametrize(("rows", "m", "n"), SHAPES)
def test_cross_is_the_specification(isa, rows, m, n):
    """Neither symmetric nor square, and on the right side: every block, also those below the diagonal."""
    y, x = make(rows, m), make(rows, n, seed=1)
    C = torch.eye(m, n)
    fixed.fixed_cross_(C, y, x)
    a, b = reference.fixed_point(y.T).double(), reference.fixed_point(x.T).double()
    assert torch.allclose(C.double(), torch.eye(m, n).double() + a @ b.T, rtol=1e-5, atol=1e-5 * rows**0.5)
    wide = make(rows, 2 * m, seed=2)
    one, two = torch.zeros(m, n), torch.zeros(m, n)
    fixed.fixed_cross_(one, wide[:, m:], x)
    fixed.fixed_cross_(two, wide[:, m:].contiguous(), x)
    assert torch.equal(one, two)


def test_a_massive_row_spoils_its_own_run_only(isa):
    """One token a thousand times larger than the others, as real models have: the other runs are as exact as ever."""
    x = make(512, 64)
    x[130] *= 1000
    G = torch.zeros(64, 64)
    fixed.fixed_gram_(G, x)
    without = torch.cat([x[:128], x[256:]])
    rest = torch.zeros(64, 64)
    fixed.fixed_gram_(rest, without)
    exact = without.double().T @ without.double()
    assert float((rest.double() - exact).norm() / exact.norm()) < 2e-4
    exact = x.double().T @ x.double()
    assert float((G.double() - exact).norm() / exact.norm()) < 2e-4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv", "tokens", "width"), [(1, 1, 1, 1), (4, 2, 48, 64), (9, 3, 130, 64), (2, 2, 300, 150)]
)
def test_attention_is_the_specification_and_close_to_exact(isa, heads, kv, tokens, width, causal):
    q, k, v = make(2, heads, tokens, width), make(2, kv, tokens, width, seed=1), make(2, kv, tokens, width, seed=2)
    scale = width**-0.5
    got = fixed.fixed_attention(q, k, v, scale, causal)
    spec = reference.fixed_attention(q.double(), k.double(), v.double(), scale, causal)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal, enable_gqa=True)
    assert got.shape == exact.shape
    assert float((got - spec).abs().max()) < 4e-4  # a weight that is rounded the other way
    assert float((got - exact).norm() / exact.norm()) < 6e-4
    turned = fixed.fixed_attention(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), scale, causal)
    assert torch.equal(turned, got)


def test_attention_keeps_what_is_not_finite_visible(isa):
    q, k, v = make(1, 1, 100, 64), make(1, 1, 100, 64, seed=1), make(1, 1, 100, 64, seed=2)
    k[0, 0, 60, 3] = float("nan")
    out = fixed.fixed_attention(q, k, v, 0.125)[0, 0]
    assert out[:60].isfinite().all() and out[60:].isnan().all()


def test_attention_of_one_large_score(isa):
    """Scores far apart: the softmax is one-hot, nothing overflows."""
    q, k, v = torch.eye(64)[None, None] * 1e4, torch.eye(64)[None, None] * 1e4, make(1, 1, 64, 64)
    out = fixed.fixed_attention(q, k, v, 1.0, causal=False)
    assert torch.allclose(out, reference.fixed_point(v.mT).mT, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(isa, threads):
    x, w = make(500, 300), make(100, 300, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            G = torch.zeros(300, 300)
            fixed.fixed_gram_(G, x)
            results.append((fixed.fixed_linear(x, w), G))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("m", [2064, 2051])
def test_large_results_are_those_of_their_parts(isa, m):
    """Large ones are written past the caches, where lines are whole."""
    x, w = make(2050, 32), make(m, 32, seed=1)
    assert 2050 * m > 4 << 20
    assert torch.equal(fixed.fixed_linear(x, w), torch.cat([fixed.fixed_linear(part, w) for part in x.split(480)]))


def test_slices_and_batches(isa):
    wide, w = make(4, 30, 500), make(20, 500, seed=1)
    assert torch.equal(
        fixed.fixed_linear(wide[..., 50:250], w[:, 50:250]),
        fixed.fixed_linear(wide[..., 50:250].contiguous(), w[:, 50:250].contiguous()),
    )
    assert torch.equal(fixed.fixed_linear(wide, w)[2], fixed.fixed_linear(wide[2], w))


def test_within_the_mode_linear_layers_are_fixed_point():
    layer, x = torch.nn.Linear(100, 50), make(2, 40, 100)
    with torch.no_grad():
        plain = layer(x)
        with fixed.FixedPoint():
            inside = layer(x)
            few = layer(x[0, :5])
        assert torch.equal(inside, fixed.fixed_linear(x, layer.weight, layer.bias)) and not torch.equal(inside, plain)
        assert torch.equal(few, layer(x[0, :5]))
        assert torch.equal(layer(x), plain)
        with fixed.FixedPoint():
            assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("largest", "off"), [(1, 1e-4), (1000, 0.02)])
def test_the_error_of_a_solved_layer_survives_fixed_point(largest, off):
    """A sweep leaves little error along a massive channel, where the gram matrix is rounded most."""
    x, w = make(2048, 256) @ (torch.eye(256) + 0.02 * make(256, 256, seed=1)), make(64, 256, seed=2)
    x[:, 7] *= largest
    x += 0.05 * x[:, 7:8] * make(256, seed=3)
    seen = stats.Stats.empty(256)
    seen.update(x)
    error = Sweep()(w, Int(4, 64), seen).dense() - w
    exact = float(((error.double() @ seen.gram.double()) * error.double()).sum())
    with fixed.FixedPoint():
        assert float(stats.loss(error, seen.gram)) == pytest.approx(exact, rel=off)


def test_wrong_requests_are_named():
    with pytest.raises(RequestError, match=r"x float32\[..., n\]"):
        fixed.fixed_linear(make(3, 4), make(3, 5))
    with pytest.raises(RequestError, match="bias"):
        fixed.fixed_linear(make(3, 4), make(3, 4), make(2))
    with pytest.raises(RequestError, match=r"y float32\[T, m\] and x float32\[T, n\]"):
        fixed.fixed_cross_(torch.zeros(4, 4), make(5, 4), make(6, 4))
    with pytest.raises(RequestError, match=r"G float32\[n, n\]"):
        fixed.fixed_gram_(torch.zeros(3, 3), make(5, 4))
    assert "VPMADDWD" in kernels.info()["fixed_linear"].why or kernels.level() == "portable"
