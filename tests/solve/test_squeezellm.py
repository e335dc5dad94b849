"""SqueezeLLM (arXiv 2306.07629): k-means to the optimum, the Fisher information against gradients of the whole model,
dense and sparse parts.
"""

import itertools
import json

import pytest
import torch

from fewbits import api, formats
from fewbits.errors import RequestError
from fewbits.formats import Entry
from fewbits.grids import Int, Learned
from fewbits.kernels.cluster import kmeans, reference_kmeans
from fewbits.pipeline.fisher import Fisher
from fewbits.plan import Recipe
from fewbits.runtime import decode, load
from fewbits.solve import Sensitive, Sweep
from fewbits.split import Largest, Outliers
from fewbits.stats import Stats
from tests.solve.test_gptaq import SMALL as CALIBRATED
from tests.solve.test_gptaq import TEXT, damped
from tests.tiny import tiny_model, tiny_tokenizer


def cost(v, f, centers):
    """``Σ f (v - nearest)²`` of each row, float64."""
    distance = (v.double()[:, :, None] - centers.double()[:, None]).square().amin(-1)
    return (f.double() * distance).sum(1)


# ---- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("v", "f", "k", "centers", "least"),
    [
        ([0, 1, 2, 10], [1, 1, 1, 1], 2, [1, 10], 2.0),
        ([0, 1, 2, 10], [1, 1, 100, 1], 2, [201 / 102, 10], 4.911765),
        ([0, 1, 10, 11, 20, 21], [1] * 6, 3, [0.5, 10.5, 20.5], 1.5),  # a trap for Lloyd's iteration
    ],
)
def test_by_hand(v, f, k, centers, least):
    v, f = torch.tensor([v]).float(), torch.tensor([f]).float()
    found = kmeans(v.flip(1), f.flip(1), k)
    assert found[0].tolist() == pytest.approx(centers, rel=1e-6)
    assert float(cost(v, f, found)) == pytest.approx(least, rel=1e-6)


def test_equals_every_partition():
    """All ways to cut up to 10 numbers into at most 4 intervals."""
    g = torch.Generator().manual_seed(0)
    for n, k in itertools.product((1, 2, 5, 10), (1, 2, 3, 4)):
        v, f = torch.randn(3, n, generator=g).sort(1).values, torch.rand(3, n, generator=g) ** 4
        for row in range(3):
            best = float("inf")
            for cuts in itertools.combinations(range(1, n), min(k, n) - 1):
                total = 0.0
                for a, b in itertools.pairwise([0, *cuts, n]):
                    x, m = v[row, a:b].double(), f[row, a:b].double()
                    total += float((m * (x - (m * x).sum() / m.sum()).square()).sum())
                best = min(best, total)
            for solver in (kmeans, reference_kmeans):
                found = solver(v[row : row + 1], f[row : row + 1], k)
                assert float(cost(v[row : row + 1], f[row : row + 1], found)) <= best * (1 + 1e-6) + 1e-10
                assert bool((found.diff() >= 0).all())


@pytest.mark.parametrize("k", [4, 8, 16])
def test_thousand_rows_reach_the_optimum_of_the_dynamic_programme(k):
    """The costs in float64 of the partitions found: within 1e-9 of those of the reference over every cut."""
    g = torch.Generator().manual_seed(k)
    rows, n = 1000 // 3 + 1, 64
    v = torch.randn(rows, n, generator=g).sort(1).values
    f = torch.exp(1.5 * torch.randn(rows, n, generator=g))
    fast, slow = (partition_cost(v, f, solver(v, f, k)) for solver in (kmeans, reference_kmeans))
    assert torch.allclose(fast, slow, rtol=1e-9, atol=0)


def partition_cost(v, f, centers):
    """The cost of the nearest-center partition with its exact means: float32 centers lose nothing that counts."""
    code = torch.searchsorted(((centers[:, 1:] + centers[:, :-1]) / 2).double(), v.double())
    v, f, k = v.double(), f.double(), centers.shape[1]
    mass, moment = (torch.zeros(len(v), k, dtype=torch.float64).scatter_add_(1, code, t) for t in (f, f * v))
    return (f * (v - (moment / mass.clamp(min=1e-300)).gather(1, code)).square()).sum(1)


def test_gaussian_rows_have_the_known_errors():
    """Lloyd-Max for the normal distribution: .1175, .03454, .00950; rows of 1024 do a little better."""
    v = torch.randn(40, 1024, generator=torch.Generator().manual_seed(0))
    for bits, known in ((2, 0.1175), (3, 0.03454), (4, 0.0095)):
        relative = cost(v, torch.ones_like(v), kmeans(v, torch.ones_like(v), 2**bits)).mean() / v.square().sum(1).mean()
        assert 0.85 * known < float(relative) < known


def test_laws_of_the_centers():
    g = torch.Generator().manual_seed(1)
    v, f = torch.randn(20, 100, generator=g), torch.rand(20, 100, generator=g)
    costs = [cost(v, f, kmeans(v, f, k)) for k in (2, 4, 8, 16)]
    assert all(bool((a >= b).all()) for a, b in itertools.pairwise(costs))
    assert torch.allclose(kmeans(v, f, 8), kmeans(v, 1024 * f, 8), rtol=1e-5)
    few = torch.randint(0, 8, (20, 100), generator=g).float()
    assert float(cost(few, f, kmeans(few, f, 8)).max()) < 1e-9
    f[:, 7] = 1e8
    assert float((kmeans(v, f, 8) - v[:, 7:8]).abs().amin(1).max()) < 1e-3
    for odd in (torch.zeros(2, 9), torch.full((2, 9), 3.0)):
        assert torch.equal(kmeans(odd, torch.zeros(2, 9), 4), odd[:, :4])


# ---- grid, solver, split ---------------------------------------------------------------------------------------------


def weights(out=24, columns=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out, columns, generator=g) * 0.05, torch.exp(1.5 * torch.randn(out, columns, generator=g)) * 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_laws(bits):
    w, F = weights()
    grid = Learned(bits)
    p = grid.fit(w, F)
    codes = grid.encode(w, p)
    y = grid.decode(codes, p)
    assert torch.equal(grid.decode(grid.encode(y, p), p), y)
    assert torch.equal((w - y).abs(), (w[:, :, None] - p["table"].float()[:, None]).abs().amin(-1))
    uniform = Int(bits, -1)
    q = uniform.fit(w)
    rtn = uniform.decode(uniform.encode(w, q), q)
    assert bool(((F * (w - y) ** 2).sum(1) < (F * (w - rtn) ** 2).sum(1)).all())
    assert grid.cost((24, 64)) == bits + 16 * 2**bits / 64


def test_dense_and_sparse():
    """Kept weights are exact to float16, their number is exact, and they do not draw centers."""
    w, F = weights()
    w[3, 5] = 7.0
    stats = Stats.nothing()
    stats.fisher = F
    dense = Sensitive()(w, Learned(3), stats)
    assert dense.residual is None
    for split, count in ((Largest(0.01, 0.005), 16 + 8), (Largest(0.01, 0.0), 16), (Largest(0.0, 0.005), 8)):
        q = Sensitive()(w, Learned(3), stats, split)
        mask = q.residual.dense() != 0
        assert int(mask.sum()) == count
        assert torch.allclose(q.dense()[mask], w[mask], rtol=2e-3, atol=1e-4)
        if split.magnitude:
            assert bool(mask[3, 5]) and float(q.params["table"][3].abs().max()) < 1
    with pytest.raises(RequestError, match="known beforehand"):
        Sensitive()(w, Learned(3), stats, Outliers())
    with pytest.raises(RequestError, match="Fisher"):
        Sensitive()(w, Learned(3), None)
    assert "cannot weigh" in Recipe(Int(4, 16), Sensitive()).refusal((8, 16))


def test_error_feedback_on_learned_tables():
    """Another axis: GPTQ on tables; the loss identity holds, and outputs are closer than those of nearest codes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 32, generator=g) @ torch.randn(32, 32, generator=g)
    stats, w = Stats.empty(32), torch.randn(8, 32, generator=g)
    stats.update(x)
    q = Sweep()(w.double(), Learned(3), stats)
    E = q.dense().double() - w.double()
    assert q.meta["loss"] == pytest.approx(float(((E @ damped(stats.gram)) * E).sum()), rel=1e-6)
    nearest = Learned(3)
    p = nearest.fit(w, stats.gram.diagonal())
    assert (x @ E.float().T).square().sum() < (x @ (nearest.decode(nearest.encode(w, p), p) - w).T).square().sum()


@pytest.mark.parametrize("bits", [3, 4])
def test_stored_and_read_back(bits):
    w, F = weights(21, 50)
    stats = Stats.nothing()
    stats.fisher = F
    q = Sensitive()(w, Learned(bits), stats, Largest(0.02, 0.01))
    layout = formats.writer("fewbits", [Entry("m", (21, 50), q.grid, residual="Sparse")])
    packed = layout.pack("m", q)
    back = layout.unpack("m", {k.split(".", 1)[1]: t for k, t in packed.items()})
    assert torch.equal(back.dense(), q.dense())
    stored = 8 * sum(t.numel() * t.element_size() for t in packed.values())
    assert 0 <= stored - q.bits_per_weight() * w.numel() <= 32 * 21


# ---- gradients and whole models --------------------------------------------------------------------------------------

SMALL = {k: v for k, v in CALIBRATED.items() if k not in ("bits", "group_size")}


def make(family, folder):
    tiny_model(family, folder, vocab_size=320)
    tiny_tokenizer(folder, TEXT)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("family", "compute", "tokens", "off"),
    [*((f, "fp32", 12, 1e-3) for f in ("llama", "gpt2", "opt")), *((f, "fixed", 40, 2e-2) for f in ("llama", "gpt2"))],
)
def test_fisher_is_the_mean_of_squared_gradients_of_rows(family, compute, tokens, off, tmp_path, monkeypatch):
    """Against autograd through transformers' whole model, row by row; however the rows are portioned."""
    from fewbits.model import Source, get_weight

    source = Source.open(make(family, tmp_path / "model"))
    rows = torch.randint(3, 300, (5, tokens), generator=torch.Generator().manual_seed(0))
    model = load(tmp_path / "model", dtype=torch.float32)[0]
    locals_ = [list(source.linears(source.skeleton(i))) for i in range(source.n_blocks)]
    names = [[source.disk_name(i, n) for n in own] for i, own in enumerate(locals_)]
    modules = dict(model.named_modules())
    want = {}
    for row in rows:
        model.zero_grad()
        model.requires_grad_(True)
        model(row[None], labels=row[None]).loss.backward()
        for own in names:
            for name in own:
                module = next(m for n, m in modules.items() if n.endswith(name) or (name.endswith(n) and "." in n))
                g = module.weight.grad.t() if type(module).__name__ == "Conv1D" else module.weight.grad
                want[name] = want.get(name, 0) + g.square() / len(rows)
    for budget in (1, 1 << 30):
        monkeypatch.setattr("fewbits.pipeline.fisher.BUDGET", budget)
        folder = tmp_path / str(budget)
        folder.mkdir()
        fisher = Fisher(source, locals_, folder)
        fisher.gather(rows, compute, lambda n, of: None)
        for i, own in enumerate(locals_):
            found = fisher.of(i)
            for local, name in zip(own, names[i], strict=True):
                assert found[local].shape == get_weight(source.skeleton(i).get_submodule(local)).shape
                scale = float(want[name].max())
                assert torch.allclose(found[local], want[name], rtol=off, atol=off / 100 * scale)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_row_counts_alone_however_many_go_at_once(family, tmp_path, monkeypatch):
    """Experts see tokens out of their rows: there rows go one by one."""
    from fewbits.model import Source

    source = Source.open(make(family, tmp_path / "model"))
    rows = torch.randint(3, 300, (5, 12), generator=torch.Generator().manual_seed(0))
    locals_ = [list(source.linears(source.skeleton(i))) for i in range(source.n_blocks)]
    found = []
    for tokens in (12, 36, 1000):
        monkeypatch.setattr("fewbits.pipeline.fisher.BATCH", tokens)
        folder = tmp_path / str(tokens)
        folder.mkdir()
        fisher = Fisher(source, locals_, folder)
        fisher.gather(rows, "fp32", lambda n, of: None)
        found.append([fisher.of(i) for i in range(source.n_blocks)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            for name, want in one.items():
                assert torch.allclose(two[name], want, rtol=1e-4, atol=1e-6 * float(want.max()))


def test_long_rows_count_by_their_beginnings(llama, tmp_path, monkeypatch):
    from fewbits.model import Source

    source = Source.open(llama)
    rows = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    locals_ = [list(source.linears(source.skeleton(i))) for i in range(source.n_blocks)]
    monkeypatch.setattr("fewbits.pipeline.fisher.TOKENS", 16)
    found = []
    for n in (24, 16):
        folder = tmp_path / str(n)
        folder.mkdir()
        fisher = Fisher(source, locals_, folder)
        fisher.gather(rows[:, :n], "fp32", lambda n, of: None)
        found.append(fisher.of(0))
    assert all(torch.equal(found[0][name], found[1][name]) for name in locals_[0])


@pytest.mark.parametrize("method", ["squeezellm", "squeezellm-sparse"])
def test_whole_model(method, llama, tmp_path):
    """Quantize, load, generate, count."""
    from transformers import AutoModelForCausalLM

    from fewbits.evaluate.census import census

    out = tmp_path / "out"
    result = api.quantize(llama, out, method=method, bits=4, **SMALL)
    assert result.kl is not None and result.format == "fewbits"
    found = census(out, check=True)
    assert found.bits_per_weight == pytest.approx(result.bits_per_weight, rel=1e-9)
    events = [json.loads(x) for x in (out / "fewbits_events.jsonl").read_text().splitlines()]
    assert all("fallback" not in e for e in events)
    kept = sum(e.get("kept", 0) for e in events) / len(events)
    assert kept == pytest.approx(0.0045 if "sparse" in method else 0, rel=0.2)
    model, ids = AutoModelForCausalLM.from_pretrained(out), torch.tensor([[1, 5, 9]])
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    assert decode.generate(load(out)[0], ids, 4) == tokens
    assert not list(tmp_path.glob("*.partial"))


def test_resumed_runs_do_not_gather_again(llama, tmp_path):
    out, counted = tmp_path / "out", []

    def stop(event):
        counted.append(event["event"])
        if event["event"] == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(llama, out, method="squeezellm", on_event=stop, **SMALL)
    assert "fisher" in counted
    counted.clear()
    api.quantize(llama, out, method="squeezellm", resume=True, on_event=lambda e: counted.append(e["event"]), **SMALL)
    assert "fisher" not in counted
    api.quantize(llama, tmp_path / "whole", method="squeezellm", **SMALL)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_transforms_are_refused(llama, tmp_path):
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(
        "rules: [{match: '*', recipe: {grid: {kind: learned, bits: 4}, solver: {kind: sensitive}}}]\n"
        "transforms: [{kind: awq, steps: 3}]\n"
    )
    with pytest.raises(RequestError, match="without transforms"):
        api.quantize(llama, tmp_path / "out", recipe=recipe, format="fewbits", **SMALL)
