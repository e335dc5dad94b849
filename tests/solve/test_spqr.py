"""SpQR (arXiv 2306.03078): grids with quantized scales, leave-one-out, outliers in the sweep, the count of bits."""

import json

import pytest
import torch

from fewbits import api, formats
from fewbits.errors import CheckpointError, Refused, RequestError
from fewbits.formats import Entry
from fewbits.grids import Bilevel, Int
from fewbits.kernels import _table
from fewbits.kernels.sparse import reference_sparse_matmul, sparse_matmul
from fewbits.runtime.linear import QuantLinear
from fewbits.solve import Nearest, Sweep
from fewbits.solve.rounding import leave_one_out, without
from fewbits.split import Largest, Outliers
from fewbits.stats import Stats
from fewbits.tensor import Quantized, Sparse
from tests.solve.test_gptaq import damped
from tests.tiny import tiny_model, tiny_tokenizer


def problem(out=8, columns=32, tokens=256, seed=0, planted=0.0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) * 0.5 + torch.randn(columns, columns, generator=g) / columns**0.5
    x = torch.randn(tokens, columns, generator=g) @ mix
    stats = Stats.empty(columns)
    stats.update(x)
    w = torch.randn(out, columns, generator=g) * 0.02
    return w * (1 + 9 * (torch.rand(out, columns, generator=g) < planted)), x, stats


def random_sparse(shape=(40, 70), share=0.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < share)
    w[3] = 0  # an empty row
    return Sparse.of(w)


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    """2 bits, row (0, 1.01, 2, 15): without 15 the others fit exactly but for 1.01; the rest worked out on paper."""
    w = torch.tensor([[0.0, 1.01, 2.0, 15.0]])
    gain = leave_one_out(Bilevel(2, -1, nested=0), w, torch.ones(4))[0]
    base = 1.01**2 + 4.0  # codes 0, 0, 0, 3 at scale 5
    alone = [
        # range 1.01..15, scale 4.6633: 1.01 exact, 2 -> 1.01, 15 exact
        0.99**2,
        4.0,
        1.01**2,
        (1.01 - 4 / 3) ** 2,  # range 0..2, scale 2/3: 1.515 rounds to code 2
    ]
    assert gain.tolist() == pytest.approx([base - a for a in alone], rel=1e-5)


class Refitted(Bilevel):
    by_range = False


def test_two_refits_tell_as_much_as_all():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(200, 16, generator=g)
    w[:20, 5], w[20:40] = w[:20].amin(1), 0.5  # the smallest twice; constant groups
    w[40:60] = torch.randint(0, 3, (20, 16), generator=g).float()
    d = torch.rand(16, generator=g) + 0.5
    fast, all_of_them = (leave_one_out(grid(3, -1, nested=0), w, d) for grid in (Bilevel, Refitted))
    assert torch.allclose(fast, all_of_them, rtol=1e-4, atol=1e-5)


def test_candidates_become_the_mean_of_the_others():
    w = torch.tensor([[1.0, 3.0, 100.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[False, False, True], [True, True, True]])
    assert without(w, mask).tolist() == [[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]]


def test_without_the_second_level_the_grid_is_minmax():
    w = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    grid = Bilevel(3, 8, nested=0)
    p = grid.fit(w)
    parts = w.split(8, 1)
    scale = torch.stack([(t.amax(1) - t.amin(1)) / 7 for t in parts], 1)
    zero = torch.stack([-t.amin(1) for t in parts], 1) / scale
    assert torch.allclose(p["scale"], scale) and torch.allclose(p["zero"], zero, atol=1e-5)
    error = (grid.decode(grid.encode(w, p), p) - w).abs()
    assert bool((error <= scale.repeat_interleave(8, 1)[:, :20] / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("shape", [(32, 64), (33, 40), (5, 16), (1, 7)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bilevel_laws(shape, bits):
    """Idempotent; scales positive and among the 2**nested of their tile; the first level bounds the second's loss."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) * 0.05
    grid = Bilevel(bits)
    p = grid.fit(w)
    y = grid.decode(grid.encode(w, p), p)
    assert torch.equal(grid.decode(grid.encode(y, p), p), y)
    scale, zero = grid.statistics(p)
    assert bool((scale > 0).all()) and bool(torch.isfinite(zero).all())
    for tile in scale.split(16):
        assert all(len(set(column.tolist())) <= 8 for column in tile.T)
    plain = Bilevel(bits, nested=0)
    q = plain.fit(w)
    best = (plain.decode(plain.encode(w, q), q) - w).norm()
    assert float((y - w).norm()) < 1.4 * float(best) + 1e-6


def test_constant_groups_and_zeros():
    for w in (torch.zeros(4, 32), torch.full((4, 32), 0.3)):
        grid = Bilevel()
        p = grid.fit(w)
        assert torch.isfinite(grid.decode(grid.encode(w, p), p)).all()


def test_equal_scales_cost_nothing():
    """A tile whose groups are all alike is coded as without the second level, up to float16."""
    w = torch.linspace(-1, 1, 16).repeat(16, 2)
    a, b = (g.decode(g.encode(w, p), p) for g in (Bilevel(), Bilevel(nested=0)) for p in [g.fit(w)])
    assert torch.allclose(a, b, atol=2e-3)


# ---- the sweep -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_no_outliers_is_plain_gptq(static, order):
    w, _, stats = problem()
    solver = Sweep(order=order, static=static)
    for grid in (Bilevel(3, 16, nested=0), Bilevel(), Int(3, 16)):
        a, b = solver(w, grid, stats), solver(w, grid, stats, Outliers(1e9))
        assert torch.equal(a.codes, b.codes) and b.residual is None


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("split", [Outliers(0.05), Outliers(0.3), Largest(0.02, 0.01)])
def test_loss_identity(split, order):
    """Σ e² = tr((Q-W)(H+λI)(Q-W)ᵀ) with what was kept in Q: the rounding of kept values to float16 is fed back too."""
    w, _, stats = problem(planted=0.02)
    for static in (True, False):
        q = Sweep(order=order, static=static)(w.double(), Bilevel(), stats, split)
        assert isinstance(q.residual, Sparse)
        E = q.grid.decode(q.codes, q.params).double() + q.residual.dense().double() - w.double()
        assert q.meta["loss"] == pytest.approx(float(((E @ damped(stats.gram)) * E).sum()), rel=1e-5)


def test_sweep_with_outliers_is_exact_elimination():
    """Column by column, with an inverse computed afresh for every column."""
    w, _, stats = problem(columns=40, planted=0.05)  # wider than what leave-one-out screens
    w, H, grid = w.double(), damped(stats.gram), Int(3, -1, scale="float32")
    q = Sweep(importance=False)(w, grid, stats, Outliers(0.1, most=1.0))
    p, x = grid.fit(w.float()), w.clone()
    pivots = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(40)])
    limit = 0.1 * float((w.var(0, unbiased=False) / pivots).mean())
    kept, codes = torch.zeros_like(w), torch.zeros(w.shape, dtype=torch.uint8)
    for j in range(40):
        inv = torch.linalg.inv(H[j:, j:])
        code = grid.encode(x, p)[:, j]
        left = x[:, j] - grid.decode(grid.encode(x, p), p)[:, j]
        kept[:, j] = torch.where(left**2 / inv[0, 0] > limit, left, 0).half().double()
        x[:, j + 1 :] -= ((left - kept[:, j]) / inv[0, 0])[:, None] * inv[0, 1:]
        codes[:, j] = code
    assert torch.equal(q.codes, codes) and int((kept != 0).sum()) > 4
    assert torch.equal(q.residual.dense(), kept.float())


def test_everything_kept_is_exact_and_the_count_falls_with_the_threshold():
    w, _, stats = problem(planted=0.01, out=64)
    counts = []
    for threshold in (0.0, 0.05, 0.1, 0.2, 0.4, 1.0, 1e9):
        q = Sweep(damp=0.1)(w, Bilevel(), stats, Outliers(threshold, most=1.0))
        counts.append(0 if q.residual is None else len(q.residual.values))
        if threshold == 0:
            assert torch.allclose(q.dense(), w, atol=1e-4)
    assert counts == sorted(counts, reverse=True) and counts[0] > 0.95 * w.numel() and counts[-1] == 0


def test_planted_outliers_are_found():
    """The recall of planted weights above 0.1 and the fall of the loss as the threshold falls."""
    found = {}
    for threshold in (1e9, 0.4, 0.2):
        losses, recall = 0.0, []
        for seed in range(3):
            w, x, stats = problem(64, 256, 2048, seed, planted=0.005)
            q = Sweep()(w, Bilevel(3, 16, nested=0), stats, Outliers(threshold))
            losses += float((x @ (q.dense() - w).T).square().sum())
            kept = torch.zeros_like(w) if q.residual is None else q.residual.dense()
            recall.append(float((kept[w.abs() > 0.1] != 0).float().mean()))
        found[threshold] = losses, sum(recall) / 3
    assert found[1e9][1] == 0 and found[0.4][1] > 0.85 and found[0.2][1] > 0.95
    assert found[0.2][0] < found[0.4][0] < 0.7 * found[1e9][0]


def test_at_most_the_share_asked_for():
    w, _, stats = problem()
    q = Sweep()(w, Bilevel(), stats, Outliers(0.0, most=0.03))
    assert len(q.residual.values) <= 0.03 * w.numel()


class ByColumns(Bilevel):
    keep = None  # type: ignore[assignment]


@pytest.mark.parametrize("most", [1.0, 0.02])
def test_the_kernel_keeps_what_the_specification_keeps(most):
    """Also where more weights are dear than may be kept."""
    g = torch.Generator().manual_seed(0)
    stats = Stats.empty(160)
    stats.update(torch.randn(400, 160, generator=g) @ torch.randn(160, 160, generator=g))
    w = torch.randn(48, 160, generator=g)
    solver, split = Sweep(order="activation", static=True), Outliers(threshold=0.1, most=most)
    a, b = (solver(w, grid(), stats, split) for grid in (Bilevel, ByColumns))
    assert isinstance(a.residual, Sparse) and isinstance(b.residual, Sparse)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.residual.dense(), b.residual.dense())
    assert (len(a.residual.values) == int(0.02 * w.numel())) == (most == 0.02)


def test_dead_columns_do_not_lower_the_threshold():
    w = problem()[0]
    split, pivots = Outliers(0.2), torch.ones(32)
    live = torch.ones(32, dtype=torch.bool)
    live[4:] = False
    assert split.limit(w, pivots, live) == pytest.approx(0.2 * float(w[:, :4].var(0, unbiased=False).mean()))


def test_largest_counts_exactly_ties_included():
    w = torch.ones(10, 20)
    w[0, 0] = 5
    mask = Largest(0.1, 0.05).known(w, torch.ones(10, 20))
    assert int(mask.sum()) == 30 and bool(mask[0, 0])
    assert int(Largest(0.0, 0.05).known(w, torch.ones(10, 20)).sum()) == 10
    with pytest.raises(RequestError, match="sensitive"):
        Largest(0.1, 0.05).known(w, None)


# ---- stored and run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Bilevel(), Bilevel(4, 8, 2, 4), Bilevel(3, 16, 0), Int(4, 16)])
@pytest.mark.parametrize("shape", [(32, 64), (21, 50)])
def test_stored_and_read_back(grid, shape):
    w, g = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    p = grid.fit(w)
    kept = Sparse.of(torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.05))
    q = Quantized(grid, grid.encode(w, p), p, kept)
    entry = Entry("m", shape, grid, residual="Sparse")
    layout = formats.writer("fewbits", [entry])
    packed = layout.pack("m", q)
    back = layout.unpack("m", {k.split(".", 1)[1]: t for k, t in packed.items()})
    assert torch.equal(back.dense(), q.dense()) and torch.equal(back.codes, q.codes)
    stored = 8 * sum(t.numel() * t.element_size() for t in packed.values())
    rounding = 32 * (shape[0] + 2)  # codes and parameters end at whole words
    assert 0 <= stored - q.bits_per_weight() * w.numel() <= rounding


def test_bits_of_the_paper():
    assert Bilevel(3).cost((4096, 4096)) == 3.625 and Bilevel(4).cost((4096, 4096)) == 4.625


def test_wide_columns_and_extreme_values_survive():
    """Columns above 32767 are unsigned; negative, subnormal and large float16 values come back to the bit."""
    w = torch.zeros(3, 65536)
    w[0, 65535], w[0, 40000], w[2, 32768], w[2, 0] = -6e-8, 65504.0, -0.1, 2.0**-24
    s = Sparse.of(w)
    packed = {k.split(".", 1)[1]: t for k, t in formats.fewbits.sparse.pack("m", s).items()}
    back = formats.fewbits.sparse.unpack("m", packed, (3, 65536))
    assert torch.equal(back.dense(), w.half().float()) and torch.equal(back.values, s.values)


@pytest.mark.parametrize("damage", ["offsets", "column", "order", "missing", "nan"])
def test_damaged_entries_are_refused(damage):
    s = random_sparse()
    packed = {k.split(".", 1)[1]: t for k, t in formats.fewbits.sparse.pack("m", s).items()}
    if damage == "offsets":
        packed["sparse_rows"][5] = 10_000
    elif damage == "column":
        packed["sparse"][0] = packed["sparse"][0] | 0xFFFF
    elif damage == "order":
        packed["sparse"][:2] = packed["sparse"][:2].flip(0)
    elif damage == "nan":
        packed["sparse"][0] = (0x7E00 << 16) | int(s.columns[0])
    else:
        del packed["sparse"]
    with pytest.raises(CheckpointError, match="sparse"):
        formats.fewbits.sparse.unpack("m", packed, s.shape)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_sparse_kernel_at_every_length_of_a_row(isa, share):
    """Rows of none, few and many entries, in vectors and behind them; entries of other rows count for nothing, even
    where they meet an infinite input.
    """
    if _table.C is None:
        pytest.skip("no C++ extension")
    g = torch.Generator().manual_seed(5)
    w = torch.randn(90, 70, generator=g)
    kept = torch.rand(90, 70, generator=g) < share
    kept[:40] = torch.arange(70) < torch.arange(40)[:, None]
    kept[-3:] = torch.arange(70) < torch.tensor([9, 0, 3])[:, None]
    s = Sparse.of(torch.where(kept, w, 0))
    x = torch.randn(2, 70, generator=g)
    spoiled = torch.cat([torch.full((2, 1), torch.inf), x[:, 1:]], 1)
    _table.C.limit_isa(isa)
    try:
        y, z = (sparse_matmul(t, s.offsets, s.columns, s.values) for t in (x, spoiled))
    finally:
        _table.C.limit_isa("amx")
    assert torch.allclose(y.double(), x.double() @ s.dense().double().T, rtol=1e-5, atol=1e-5)
    narrow = x.bfloat16()
    assert torch.equal(*(sparse_matmul(t, s.offsets, s.columns, s.values) for t in (narrow, narrow.float())))
    free = ~kept[:, 0]
    assert bool(z[:, free].isfinite().all()) and not bool(z[:, ~free].isfinite().any())


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_sparse_kernel(tokens):
    s = random_sparse()
    x = torch.randn(tokens, 70, generator=torch.Generator().manual_seed(tokens))
    want = (x.double() @ s.dense().double().T).float()
    for product in (sparse_matmul, reference_sparse_matmul):
        assert torch.allclose(product(x, s.offsets, s.columns, s.values), want, rtol=1e-5, atol=1e-5)
    tiny = Sparse.of(torch.tensor([[6e-8, -65504.0, -6.1e-5]]))
    x = torch.tensor([[1.0, 0.5, 2.0]])
    y = sparse_matmul(x, tiny.offsets, tiny.columns, tiny.values)
    assert y.item() == pytest.approx(float(x @ tiny.dense().T), rel=1e-6)


@pytest.mark.parametrize("grid", [Int(4, 16), Bilevel()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_adds_the_single_weights(grid, dtype):
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    p = grid.fit(w)
    q = Quantized(grid, grid.encode(w, p), p, random_sparse((40, 64)))
    layer = QuantLinear.from_quantized(q, torch.randn(40))
    assert torch.equal(layer.dequantize(), q.dense())
    for tokens in (1, 5, 300):
        x = torch.randn(tokens, 64).to(dtype)
        want = x.float() @ q.dense().T + layer.bias
        assert torch.allclose(layer(x).float(), want, rtol=3e-2 if dtype != torch.float32 else 1e-3, atol=0.05)


TEXT = " ".join(f"the quick brown fox number {i} jumps over {i * 7 % 13} lazy dogs" for i in range(400))
SMALL = {"samples": 12, "seq_len": 16, "compute": "fp32", "calibration": [TEXT]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tiny_model("llama", tmp_path_factory.mktemp("llama"), vocab_size=320)
    tiny_tokenizer(folder, TEXT)
    return folder


def test_whole_model(llama, tmp_path):
    """Quantize, load, generate, count: bits per weight of the result, the census and the bytes agree."""
    from transformers import AutoModelForCausalLM

    from fewbits.evaluate.census import census

    out = tmp_path / "out"
    result = api.quantize(llama, out, method="spqr", **SMALL)
    found = census(out, check=True)
    assert result.format == "fewbits" and found.bits_per_weight == pytest.approx(result.bits_per_weight, rel=1e-9)
    stored = 8 * sum(m.size_bytes for m in found.modules) / sum(m.parameters for m in found.modules)
    assert stored == pytest.approx(result.bits_per_weight, rel=0.03)
    events = [json.loads(x) for x in (out / "fewbits_events.jsonl").read_text().splitlines()]
    assert all(0 <= e["kept"] <= 0.05 for e in events if "kept" in e) and any("kept" in e for e in events)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[1, 5, 9]])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)
    from fewbits.runtime import decode, load

    tokens = decode.generate(load(out)[0], ids, 4)
    assert tokens == model.generate(ids, max_new_tokens=4, do_sample=False)[0, 3:].tolist()


def test_refusals(llama, tmp_path):
    with pytest.raises(Refused, match="Sparse"):
        api.quantize(llama, tmp_path / "out", method="spqr", format="gptq", **SMALL)
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(
        "rules: [{match: '*', recipe: {grid: {kind: int}, solver: {kind: nearest}, split: {kind: outliers}}}]\n"
    )
    with pytest.raises(RequestError, match="keeps no single weights"):
        api.quantize(llama, tmp_path / "out", recipe=recipe, format="fewbits", **SMALL)
    assert Nearest().needs == frozenset()
