"""GPTAQ (arXiv 2504.02692): the sweep against exact elimination, the identities of its objective, and the walk's two
streams.
"""

import json
from contextlib import ExitStack

import pytest
import torch

from fewbits import api, kernels
from fewbits.errors import RequestError
from fewbits.grids import NAMED_GRIDS, Int
from fewbits.kernels import reference
from fewbits.model import Source
from fewbits.pipeline import walk as walking
from fewbits.pipeline.acts import pairing
from fewbits.pipeline.mixing import Mixing
from fewbits.solve import Exact, Sweep
from fewbits.solve.sweep import absorbing, carried, inverse_factor
from fewbits.stats import Stats
from tests.tiny import tiny_model, tiny_tokenizer

DOUBLE = torch.float64
VALUES = "self_attn.v_proj"


def problem(out=8, columns=16, tokens=64, seed=0, noise=0.2):
    """A weight, inputs from a quantized prefix ``x``, the same in the original model ``x0``, and their statistics."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) * 0.5 + torch.randn(columns, columns, generator=g) / columns**0.5
    x = torch.randn(tokens, columns, generator=g) @ mix
    x0 = x + noise * torch.randn(tokens, columns, generator=g) @ mix
    stats = Stats.empty(columns, frozenset({"gram", "cross"}))
    stats.update(x, original=x0)
    return torch.randn(out, columns, generator=g), x, x0, stats


def damped(gram, damp=0.01):
    H = gram.double()
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=DOUBLE)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sweep_is_exact_elimination_in_fixed_order(bits, alpha):
    for seed in range(4):
        w, _, _, stats = problem(seed=seed)
        grid = Int(bits, -1, scale="float32")
        a = Sweep(importance=False, cross=alpha)(w.double(), grid, stats)
        b = Exact(greedy=False, cross=alpha)(w, grid, stats)
        assert torch.equal(a.codes, b.codes)
        assert a.meta["loss"] == pytest.approx(b.meta["loss"], rel=1e-10)


def test_one_step_is_the_least_squares_answer():
    """Only the first column's inputs have changed and rounding is exact: what the others get is the regression of its
    residual on them.
    """
    w, x, x0, _ = problem()
    x, changed = x.double(), x.double().clone()
    changed[:, 0] = x0[:, 0].double()
    H, G = x.T @ x, (changed - x).T @ x
    U, _ = inverse_factor(H, torch.zeros(16, dtype=torch.bool), 0.0)
    A, _ = absorbing(U, G)
    leaning = carried(w.double(), A)
    target = (changed - x)[:, :1] * w[:, 0].double()  # [tokens, out]
    answer = torch.linalg.lstsq(x[:, 1:], target).solution.T
    assert torch.allclose(leaning[:, 1:] - w[:, 1:].double(), answer, rtol=1e-9, atol=1e-10)
    assert torch.equal(leaning[:, 0], w[:, 0].double())


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_result_does_not_depend_on_blocks(order, monkeypatch):
    w, _, _, stats = problem(out=12, columns=40, tokens=128)
    found = []
    for block in (1, 8, 32, 128):
        monkeypatch.setattr("fewbits.solve.sweep.BLOCK", block)
        found.append(Sweep(order=order, static=True, cross=0.5)(w.double(), Int(3, 8), stats).codes)
    assert all(torch.equal(f, found[0]) for f in found[1:])


def test_the_objective_is_that_of_plain_gptq_on_another_weight():
    """``‖Q X - W X̃‖² = ‖(Q - W*) X‖² + const`` with ``W* = W (I + G H⁻¹)``, for any Q (sheet of the method, section
    8).
    """
    w, x, x0, _ = problem()
    w, x, x0 = w.double(), x.double(), x0.double()
    H, G = x.T @ x, (x0 - x).T @ x
    star = w + w @ G @ torch.linalg.inv(H)
    rest = []
    for seed in range(5):
        q = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        asymmetric = (x @ q.T - x0 @ w.T).square().sum()
        rest.append(float(asymmetric - (x @ (q - star).T).square().sum()))
    assert rest == pytest.approx([rest[0]] * 5, rel=1e-9)


def test_loss_identity():
    """Σ e² = tr((Q-T) H (Q-T)ᵀ), T = W + V P, V the weights as they were when each was rounded: here replayed column by
    column.
    """
    w, _, _, stats = problem(columns=20)
    w, H = w.double(), damped(stats.gram)
    q = Sweep(importance=False, cross=0.7)(w, Int(3, 8), stats, None)
    U, _ = inverse_factor(stats.gram.double(), torch.zeros(20, dtype=torch.bool), 0.01)
    P = 0.7 * torch.triu(stats.cross.double() @ U.T, 1) @ U
    Q, V = q.dense().double(), w.clone()
    for j in range(20):
        e = (V[:, j] - Q[:, j]) / U[j, j]
        V[:, j + 1 :] += V[:, j : j + 1] * P[j, j + 1 :] - e[:, None] * U[j, j + 1 :]
    E = Q - (w + V @ P)
    assert q.meta["loss"] == pytest.approx(float(((E @ H) * E).sum()), rel=1e-6)


def test_no_change_of_inputs_is_plain_gptq():
    w, x, _, _ = problem()
    stats = Stats.empty(16, frozenset({"gram", "cross"}))
    stats.update(x, original=x)
    for solver in ({}, {"order": "activation", "static": True}, {"order": "activation"}):
        a, b = Sweep(**solver)(w, Int(4, 8), stats), Sweep(**solver, cross=1.0)(w, Int(4, 8), stats)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.params["scale"], b.params["scale"])


@pytest.mark.parametrize("grid", [Int(3, 16), NAMED_GRIDS["mxfp4"], NAMED_GRIDS["nf4"]])
def test_closer_to_the_original_outputs_on_average(grid):
    """On training tokens, in the mean over 12 problems, on grids of every kind; α = 1 is the paper's algorithm."""
    total = {0.0: 0.0, 0.25: 0.0, 1.0: 0.0}
    for seed in range(12):
        w, x, x0, stats = problem(out=16, columns=64, tokens=1024, seed=seed)
        for alpha in total:
            y = x @ Sweep(static=True, cross=alpha)(w, grid, stats).dense().T
            total[alpha] += float((y - x0 @ w.T).square().sum())
    assert total[1.0] < total[0.25] < total[0.0]


def test_missing_cross_statistics_are_refused():
    w, x, _, _ = problem()
    stats = Stats.empty(16)
    stats.update(x)
    with pytest.raises(RequestError, match="cross statistics"):
        Sweep(cross=0.25)(w, Int(4, 8), stats)
    unpaired = Stats.empty(16, frozenset({"gram", "cross"}))
    unpaired.update(x)
    for solver in (Sweep(cross=0.25), Exact(cross=0.25)):
        with pytest.raises(RequestError, match="cross statistics"):
            solver(w, Int(4, 8), unpaired)
    with pytest.raises(RequestError, match="pair each token"):
        unpaired.update(x, original=x[1:])


def test_cross_statistics_add_and_scale():
    g = torch.Generator().manual_seed(0)
    x, x0, s = torch.randn(90, 24, generator=g), torch.randn(90, 24, generator=g), torch.rand(24, generator=g) + 0.5

    def of(*parts):
        found = Stats.empty(24, frozenset({"gram", "cross"}))
        for a, b in parts:
            found.update(a, original=b)
        return found

    whole, exact = of((x, x0)), (x0 - x).double().T @ x.double()
    parts = of((x[:7], x0[:7])) + of((x[7:], x0[7:]))
    assert torch.allclose(whole.cross.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.allclose(parts.cross, whole.cross, rtol=1e-4, atol=1e-4)
    assert torch.allclose(whole.scaled(s).cross, of((x * s, x0 * s)).cross, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole.change, whole.cross)
    half = of((x[:30], x0[:30]), (x[30:], None))
    assert torch.allclose(half.change, 3 * of((x[:30], x0[:30])).cross) and half.scaled(s).paired == 30
    assert torch.allclose((half + whole).change, (half.cross + whole.cross) * (180 / 120))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "m", "n"),
    [(1, 1, 1), (7, 5, 5), (130, 49, 49), (300, 97, 97), (1000, 400, 400), (130, 500, 49), (9, 1, 500)],
)
def test_cross_kernel(tokens, m, n, dtype):
    """C++ = reference, any shape, sliced rows too; the same bits for any number of threads."""
    g = torch.Generator().manual_seed(n)
    y, x = (torch.randn(tokens, 2 * columns, generator=g).to(dtype)[:, :columns] for columns in (m, n))
    start = torch.randn(m, n, generator=g)
    want, before, found = start.clone(), torch.get_num_threads(), []
    reference.cross_(want, y, x)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            C = start.clone()
            kernels.cross_(C, y, x)
            found.append(C)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.allclose(found[0], want, rtol=1e-4, atol=1e-3)


# ---- through the walk ------------------------------------------------------------------------------------------------

TEXT = " ".join(f"the quick brown fox number {i} jumps over {i * 7 % 13} lazy dogs" for i in range(400))
SMALL = {"samples": 12, "seq_len": 16, "group_size": 16, "bits": 3, "compute": "fp32", "calibration": [TEXT]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tiny_model("llama", tmp_path_factory.mktemp("llama"), vocab_size=320, num_hidden_layers=3)
    tiny_tokenizer(folder, TEXT)
    return folder


@pytest.mark.parametrize("memory", [None, 20_000])
def test_the_walk_pairs_both_streams(llama, tmp_path, monkeypatch, memory):
    """The cross statistics of every layer equal those of inputs recorded in the original and in the finished model, in
    every other batch; for values those of what attention, its queries and keys not rounded yet, makes of them.
    """
    seen = {}
    solve_one = walking.solve_one

    def spy(w, recipe, stats, layout):
        seen[w.numpy().tobytes()] = (stats.cross.clone(), stats.gram.clone())
        return solve_one(w, recipe, stats, layout)

    monkeypatch.setattr(walking, "solve_one", spy)
    monkeypatch.setattr("fewbits.pipeline.acts.TOKENS_PER_BATCH", 5 * 16)
    monkeypatch.setattr("fewbits.pipeline.job.pairing", lambda tokens, widest: 2)
    job = api.quantize(
        llama, tmp_path / "out", method="gptaq", format="fewbits", max_memory=memory, dry_run=True, **SMALL
    )
    job.run(tmp_path / "out")
    (finished, _), (before, mixings) = (inputs_of(path, job.rows) for path in (tmp_path / "out", llama))
    original = Source.open(llama)
    rows, tokens = job.rows.shape
    paired = (torch.arange(rows) // 5 % 2 == 0).repeat_interleave(tokens)
    assert 0 < int(paired.sum()) < len(paired)
    pairs = 0
    for i in range(original.n_blocks):
        block = original.block(i)
        for local, module in original.linears(block).items():
            name = original.disk_name(i, local)
            mixed = mixings.get(name, lambda x: x)
            x, x0 = (mixed(r[name]).flatten(0, -2).double() for r in (finished, before))
            cross, gram = seen[module.weight.detach().float().contiguous().numpy().tobytes()]
            scale = float(gram.diagonal().mean())
            assert torch.allclose(gram.double(), x.T @ x, rtol=2e-3, atol=1e-3 * scale)
            assert torch.allclose(cross.double(), (x0 - x)[paired].T @ x[paired], rtol=2e-2, atol=2e-3 * scale)
            pairs += 1
    assert pairs == 21


@pytest.mark.parametrize(
    ("tokens", "widest", "every"), [(16384, 1536, 1), (32768, 1536, 2), (65536, 1536, 4), (10**7, 64, 4), (9, 64, 1)]
)
def test_enough_tokens_are_paired(tokens, widest, every):
    assert pairing(tokens, widest) == every


def inputs_of(path, rows):
    """By name, inputs of every linear of a model on ``rows`` (``[rows, tokens, in]``), and how values are mixed."""
    from fewbits.runtime import load

    model = load(path, dtype=torch.float32)[0]
    found, hooks = {}, []
    for name, module in model.named_modules():
        if "layers." in name and hasattr(module, "in_features"):
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: found.update({name: args[0]})))
    mixings = {f"model.layers.{i}.{VALUES}": Mixing(block, VALUES) for i, block in enumerate(model.model.layers)}
    with torch.no_grad(), ExitStack() as stack:
        for mixing in mixings.values():
            stack.enter_context(mixing.watched())
        model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found, mixings


def test_runs_give_the_same_bytes(llama, tmp_path):
    """Whatever the threads, the memory, and whether the run was interrupted."""
    before, stored = torch.get_num_threads(), []
    try:
        for k, (threads, memory) in enumerate([(1, None), (2, None), (1, 20_000)]):
            torch.set_num_threads(threads)
            out = tmp_path / f"{k}"
            api.quantize(llama, out, method="gptaq", format="fewbits", max_memory=memory, **SMALL)
            stored.append((out / "model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert stored[0] == stored[1] == stored[2]
    blocks = 0

    def stop(event):
        nonlocal blocks
        blocks += event["event"] == "block"
        if blocks == 2:
            raise KeyboardInterrupt

    out = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        api.quantize(llama, out, method="gptaq", format="fewbits", on_event=stop, **SMALL)
    api.quantize(llama, out, method="gptaq", format="fewbits", resume=True, **SMALL)
    assert (out / "model.safetensors").read_bytes() == stored[0]


def test_any_format_and_transforms(llama, tmp_path):
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(
        "rules: [{match: '*', recipe: {grid: {kind: int, bits: 4, group: 16}, solver: {kind: sweep, cross: 0.25}}}]\n"
        "transforms: [{kind: awq, steps: 3}]\nformat: gptq\n"
    )
    settings = {k: v for k, v in SMALL.items() if k not in ("bits", "group_size")}
    result = api.quantize(llama, tmp_path / "out", recipe=recipe, **settings)
    assert result.format == "gptq"
    events = [json.loads(x) for x in (tmp_path / "out/fewbits_events.jsonl").read_text().splitlines()]
    assert all("fallback" not in e for e in events)


def test_routed_experts_are_refused(tmp_path):
    folder = tiny_model("mixtral", tmp_path / "moe", vocab_size=320)
    tiny_tokenizer(folder, TEXT)
    with pytest.raises(RequestError, match="routed experts"):
        api.quantize(folder, tmp_path / "out", method="gptaq", format="fewbits", **SMALL)
