"""Quantization-aware training: LSQ's gradients in closed form, recovery of what rounding loses, exact export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.activations import PRESETS, Activations, Inputs
from fewbits.errors import RequestError
from fewbits.evaluate import score
from fewbits.fake import TERNARY, FakeLinear, fake_inputs, fake_linears
from fewbits.finetune import Adapter, Qat, Rows, Training, finetune
from fewbits.grids import NAMED_GRIDS, Int
from fewbits.runtime import QuantLinear, load


def fake(w: torch.Tensor, grid: Any, step: float | None = None, zero: float | None = None) -> FakeLinear:
    made = FakeLinear(w, None, grid)
    if step is not None:
        made.step.data.fill_(step)  # type: ignore[union-attr]
    if zero is not None:
        made.zero.fill_(zero)
    return made


def test_hand_computed_symmetric_step() -> None:
    """x = 0.26, 1.0, -1.0 at s = 0.1 on -8..7: v = 3, 7, -8; dx = 1, 0, 0; ds = 3 - 2.6, 7, -8 times LSQ's g."""
    made = fake(torch.tensor([[0.26, 1.0, -1.0]]), Int(4, -1, symmetric=True, scale="float32"), 0.1)
    w = made.fake()
    torch.testing.assert_close(w, torch.tensor([[0.3, 0.7, -0.8]]))
    for i, (dx, ds) in enumerate([(1.0, 0.4), (0.0, 7.0), (0.0, -8.0)]):
        made.zero_grad()
        w[0, i].backward(retain_graph=True)
        assert made.weight.grad is not None and made.step is not None and made.step.grad is not None
        assert made.weight.grad[0, i] == dx
        torch.testing.assert_close(made.step.grad, torch.tensor([[ds * (3 * 7) ** -0.5]]), rtol=1e-4, atol=1e-5)


def test_hand_computed_affine() -> None:
    """2 bits, z = 1, s = 0.5: x = 2.0 is clipped at 3 (x' = 1, ds = 3 - 1, dx = 0); x = 0.6: v = 2, ds = 1 - 1.2."""
    made = fake(torch.tensor([[2.0, 0.6]]), Int(2, -1, scale="float32"), 0.5, 1.0)
    w = made.fake()
    torch.testing.assert_close(w, torch.tensor([[1.0, 0.5]]))
    for i, (dx, ds) in enumerate([(0.0, 2.0), (1.0, -0.2)]):
        made.zero_grad()
        w[0, i].backward(retain_graph=True)
        assert made.weight.grad is not None and made.step is not None and made.step.grad is not None
        assert made.weight.grad[0, i] == dx
        torch.testing.assert_close(made.step.grad, torch.tensor([[ds * 2**-0.5]]), rtol=1e-4, atol=1e-5)


def test_hand_computed_inputs() -> None:
    """s = 0.1, codes -7..7: 0.26 becomes 3, ds = 3 - 2.6; 1.0 is clipped at 7, dx = 0, ds = 7; g = 14^-0.5."""
    scale = torch.nn.Parameter(torch.tensor([0.1]))
    inputs = Inputs(Activations("int4", False, "tensor"), scale)
    x = torch.tensor([[0.26, 1.0]], requires_grad=True)
    y = fake_inputs(x, inputs)
    torch.testing.assert_close(y, torch.tensor([[0.3, 0.7]]))
    for i, (dx, ds) in enumerate([(1.0, 0.4), (0.0, 7.0)]):
        x.grad = scale.grad = None
        y[0, i].backward(retain_graph=True)
        assert x.grad is not None and scale.grad is not None
        assert float(x.grad[0, i]) == pytest.approx(dx)
        torch.testing.assert_close(scale.grad, torch.tensor([ds * 14**-0.5]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_inputs_are_what_a_reader_makes_of_them(name: str) -> None:
    torch.manual_seed(0)
    scheme = PRESETS[name]
    inputs = Inputs(scheme, None if scheme.dynamic else torch.tensor([0.02]))
    x = torch.randn(3, 128, requires_grad=True)
    y = fake_inputs(x, inputs)
    torch.testing.assert_close(y, inputs(x), rtol=1e-6, atol=1e-6)
    y.sum().backward()
    assert x.grad is not None and set(x.grad.unique().tolist()) <= {0.0, 1.0}


GRIDS = {n: NAMED_GRIDS[n] for n in ("int2", "int4", "int8", "nf4-dq", "mxfp4", "fp8")}
GRIDS |= {"ternary": TERNARY, "symmetric": Int(3, 32, symmetric=True, scale="bfloat16")}


@pytest.mark.parametrize("name", GRIDS)
def test_the_forward_pass_is_the_codes_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    made = fake(torch.randn(24, 256), GRIDS[name])
    with torch.no_grad():
        made.weight.add_(torch.randn_like(made.weight) * 0.2)
        if made.step is not None:
            made.step.mul_(torch.rand_like(made.step) + 0.5)
    q = made.quantized()
    assert torch.equal(made.fake(), q.dense())
    assert name != "ternary" or q.dense()[:, :128].unique().numel() <= 3 * 24
    made(torch.randn(5, 256)).square().sum().backward()
    assert made.weight.grad is not None and made.weight.grad.abs().sum() > 0


def divergence(path: Any, original: Any, rows: Any) -> float:
    """KL(original || model at path), nats per token."""
    with torch.no_grad():
        p, q = (load(m, dtype="float32")[0](input_ids=rows).logits.flatten(0, 1) for m in (original, path))
    return float(score.compare((p, lambda x: x), (q, lambda x: x), rows.flatten())[2].mean())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "and",
        "sleeps",
        "all",
        "day",
        "long",
    ]
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(" ".join(words[i] for i in torch.randint(0, len(words), (3000,)).tolist()))
    return path


@pytest.mark.parametrize(
    ("grid", "lr", "activations"), [("int4", 3e-4, None), ("ternary", 2e-3, None), ("ternary", 2e-3, PRESETS["int8"])]
)
def test_training_recovers_half_of_what_rounding_loses(
    grid: str, lr: float, activations: Activations | None, dense: Path, text: Path, tmp_path: Path
) -> None:
    out, steps, how = tmp_path / "out", 120, Qat(group_size=64, activations=activations)
    training = Training(steps=steps, batch=4, lr=lr, schedule="cosine", max_grad_norm=1.0, checkpointing=False)
    result = finetune(dense, out, text, method="qat", grid=grid, rows=Rows(32), training=training, qat=how)
    rounded = tmp_path / "rounded"
    none = Training(steps=1, batch=1, lr=1e-12)
    finetune(dense, rounded, text, method="qat", grid=grid, rows=Rows(32), training=none, qat=how)
    tokens = load(dense)[1](text.read_text()[-2000:], add_special_tokens=False)["input_ids"]
    rows = torch.tensor(tokens[: 8 * 32]).view(8, 32)
    before, after = divergence(rounded, dense, rows), divergence(out, dense, rows)
    assert after < before / 2, (before, after)
    assert any(isinstance(m, QuantLinear) for m in load(out)[0].modules())
    assert result.bits_per_weight is not None and result.bits_per_weight < 5


FIXED = ("nvfp4", "fp8")
EXPORTS = (
    ("int3", "fewbits", None),
    ("nf4", "bitsandbytes", None),
    ("int4", "gptq", None),
    ("ternary", "fewbits", "int8"),
    ("int4", "fewbits", "int8-static"),
    ("fp8", "compressed-tensors", "fp8-static"),
    ("nvfp4", "fewbits", "nvfp4"),
)
"""Grid, format, activations."""


def test_the_checkpoint_is_the_trained_model(dense: Path, text: Path, tmp_path: Path) -> None:
    from fewbits.finetune import qat

    made: list[Any] = []
    real = qat.write

    def spy(model: Any, *rest: Any) -> Any:
        made.append(model)
        return real(model, *rest)

    qat.write = spy  # type: ignore[assignment]
    try:
        how: dict[str, Any] = {"rows": Rows(32), "training": Training(steps=3, batch=2, lr=1e-3)}
        for k, (grid, format, name) in enumerate(EXPORTS):
            out = tmp_path / str(k)
            scheme = PRESETS[name] if name else None
            what = Qat(None if grid in FIXED else 64, format, activations=scheme)
            finetune(dense, out, "self", method="qat", grid=grid, qat=what, **how)
            layers = [m for m in load(out)[0].modules() if isinstance(m, QuantLinear)]
            assert layers and all((m.inputs.scheme if m.inputs else None) == scheme for m in layers)
            ids = torch.arange(3, 35).view(2, 16)
            with torch.no_grad():
                ours, loaded = (
                    made[-1].eval()(input_ids=ids).logits,
                    load(out, dtype="float32")[0](input_ids=ids).logits,
                )
            torch.testing.assert_close(loaded, ours, rtol=1e-3, atol=1e-3)
    finally:
        qat.write = real


def test_the_models_own_text_is_the_same_for_the_same_seed(dense: Path) -> None:
    from fewbits.finetune.qat import generated

    model = load(dense)[0]
    a, b, c = (generated(model, 3, 12, seed) for seed in (1, 1, 2))
    assert [r.ids.tolist() for r in a] == [r.ids.tolist() for r in b] != [r.ids.tolist() for r in c]
    assert all(len(r.ids) == 12 for r in a)
    with torch.no_grad():
        first = model(input_ids=a[0].ids[None, :1]).logits[0, -1].argmax()
    assert int(first) == int(a[0].ids[1])  # greedy at first


def test_static_scales_are_learned_once_for_layers_that_read_the_same(dense: Path, text: Path, tmp_path: Path) -> None:
    from fewbits.finetune import qat
    from fewbits.finetune.data import read
    from fewbits.finetune.model import tokenizer_of
    from fewbits.model import Source

    how = Qat(64, activations=Activations("int8", False, "tensor", rule="percentile", percentile=99))
    source = Source.open(str(dense))
    rows = read(text, tokenizer_of(str(dense)), Rows(32))
    model = qat.prepare(load(dense, dtype="float32")[0], source, qat.grid_of("int4", how), how, rows)
    layers = fake_linears(model)
    q, k, o = (layers[f"model.layers.1.self_attn.{n}_proj"].inputs for n in "qko")
    assert q is not None and k is not None and o is not None
    assert q.scale is k.scale and q.scale is not o.scale
    begun = q.scale.detach().clone()  # type: ignore[union-attr]
    out = tmp_path / "out"
    training = Training(steps=3, batch=2, lr=1e-3, optimizer="paged-adamw")
    finetune(dense, out, text, method="qat", grid="int4", rows=Rows(32), training=training, qat=how)
    found = {n: m.inputs.scale for n, m in load(out, dtype="float32")[0].named_modules() if isinstance(m, QuantLinear)}
    q, k, o = (found[f"model.layers.1.self_attn.{n}_proj"] for n in "qko")
    assert torch.equal(q, k) and not torch.equal(q, begun) and float((q / begun - 1).abs()) < 0.5


@pytest.mark.parametrize("activations", [None, PRESETS["int8-static"]])
def test_it_goes_on_after_a_kill(activations: Activations | None, dense: Path, text: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def tell(event: dict[str, Any]) -> None:
        if event.get("step") == 3:
            raise Killed

    how: dict[str, Any] = {"method": "qat", "grid": "int4", "rows": Rows(32)}
    how |= {"qat": Qat(64, distill=False, activations=activations)}
    how |= {"training": Training(steps=4, batch=2, lr=1e-3, save_steps=2)}
    with pytest.raises(Killed):
        finetune(dense, tmp_path / "a", text, **how, on_event=tell)
    finetune(dense, tmp_path / "a", text, **how, resume=True)
    finetune(dense, tmp_path / "b", text, **how)
    logs = [[json.loads(x)["loss"] for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_wrong_requests(dense: Path, text: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"grid": "nf4", "qat": Qat(format="gptq")}, "uniform integers only"),
        ({"grid": "int4", "dtype": "bfloat16"}, "float32"),
        ({"grid": "int44"}, "is unknown"),
        ({"grid": "nf4", "qat": Qat(format="bitsandbytes", activations=PRESETS["int8"])}, "inputs"),
        ({"grid": "int4", "qat": Qat(activations=PRESETS["fp8-block"])}, "multiples of 128, not 64"),
        ({"grid": "int4", "adapter": Adapter(r=8)}, "options of adapters"),
        ({"method": "qlora", "qat": Qat(64)}, "belong to qat"),
    ):
        with pytest.raises(RequestError, match=message):
            finetune(dense, tmp_path / "o", text, **{"method": "qat", "rows": Rows(32)} | changes)  # type: ignore[arg-type]
        assert not (tmp_path / "o").exists()
