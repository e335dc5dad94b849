"""Whole runs on a tiny model: the adapter's file, plain peft, bitsandbytes, interruption, and what goes wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fewbits.cli import main
from fewbits.errors import FewbitsError, RequestError
from fewbits.finetune import Adapter, Rows, Training, finetune, load_adapter
from fewbits.finetune.train import CHECKPOINTS, LOG, newest
from fewbits.runtime import QuantLinear, load

IDS = torch.arange(3, 35).view(2, 16)
ROWS, FEW = Rows(48), Training(steps=6, batch=2, lr=5e-3, save_steps=2)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def log(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def dense_twin(path: Path, base: str) -> Any:
    """Transformers' own dense model with the dequantized weights of ``base``."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, m in load(base, dtype=torch.float32)[0].named_modules():
            if isinstance(m, QuantLinear):
                model.get_submodule(name).weight.copy_(m.dequantize())
    return model.eval()


@pytest.fixture(scope="module")
def run(dense: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("run") / "out"
    return finetune(dense, out, examples, rows=ROWS, training=FEW, adapter=Adapter(r=4, alpha=8)), out


def test_a_run_learns_and_says_so(run: tuple[Any, Path]) -> None:
    result, out = run
    losses = log(out)
    assert (result.steps, result.loss_first, result.loss) == (6, losses[0], losses[-1])
    assert result.loss < result.loss_first - 0.3
    assert (
        result.trainable == 2 * sum(4 * (a + b) for a, b in ((64, 64), (64, 32), (64, 32), (64, 64))) + 2 * 3 * 4 * 192
    )
    assert (
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
        == json.loads((out / "finetune.json").read_text())["source"]
    )


def test_the_adapter_loads_with_plain_peft_on_the_dense_model(run: tuple[Any, Path], dense: Path) -> None:
    result, out = run
    ours = load_adapter(load(result.base, dtype=torch.float32)[0], out)
    plain = PeftModel.from_pretrained(dense_twin(dense, result.base), out).eval()
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)
    assert (logits(plain) - logits(dense_twin(dense, result.base))).abs().max() > 0.05
    undone = AutoModelForCausalLM.from_pretrained(dense)
    assert logits(PeftModel.from_pretrained(undone, out)).isfinite().all()


def test_the_adapter_loads_on_a_bitsandbytes_model(
    run: tuple[Any, Path], dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("FEWBITS_PLUGIN", "0")
    result, out = run
    model = AutoModelForCausalLM.from_pretrained(result.base, dtype=torch.float32)
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    plain = PeftModel.from_pretrained(model, out).eval()
    monkeypatch.delenv("FEWBITS_PLUGIN")
    ours = load_adapter(load(result.base, dtype=torch.float32)[0], out)
    torch.testing.assert_close(logits(plain), logits(ours), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "adapter", [Adapter(r=4, rslora=True, dropout=0), Adapter(r=4, dora=True, targets=("q_proj", "down_proj"))]
)
def test_variants_of_peft(adapter: Adapter, run: tuple[Any, Path], dense: Path, examples: Path, tmp_path: Path) -> None:
    base, out = run[0].base, tmp_path / "out"
    result = finetune(base, out, examples, rows=ROWS, training=FEW, adapter=adapter)
    assert result.base == base and result.loss < result.loss_first - 0.1 and not (out / "base").exists()
    ours = load_adapter(load(base, dtype=torch.float32)[0], out)
    plain = PeftModel.from_pretrained(dense_twin(dense, base), out).eval()
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_other_bases(method: str, dense: Path, examples: Path, tmp_path: Path) -> None:
    training = Training(steps=2, batch=2, checkpointing=False, schedule="cosine")
    result = finetune(dense, tmp_path / "out", examples, method=method, grid="int4", rows=ROWS, training=training)
    assert (tmp_path / "out" / "base").exists() == (method == "qlora")
    assert result.steps == 2


def test_a_base_that_learned_from_the_training_data_is_nearer_to_the_model(
    dense: Path, examples: Path, tmp_path: Path
) -> None:
    training, text = Training(steps=1, batch=2, checkpointing=False), tmp_path / "text.txt"
    text.write_text("\n".join(json.loads(x)["prompt"] for x in examples.read_text().splitlines()) * 8)
    lost = {}
    ids = torch.tensor(load(dense)[1](text.read_text(), add_special_tokens=False)["input_ids"][: 8 * 48]).view(8, 48)
    wanted = logits(load(dense, dtype=torch.float32)[0], ids)
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        finetune(dense, out, text, base_method=method, rows=ROWS, training=training)
        config = json.loads((out / "base" / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "bitsandbytes"
        lost[method] = float((logits(load(out / "base", dtype=torch.float32)[0], ids) - wanted).square().mean())
    assert lost["gptq"] < 0.8 * lost["rtn"], lost


def test_rows_of_a_base_come_from_all_of_the_data() -> None:
    from fewbits.finetune.data import Row
    from fewbits.finetune.model import cut

    rows = [Row(torch.arange(n) + 1000 * i, torch.zeros(n), torch.zeros(n)) for i, n in enumerate([5, 4] * 200)]
    ids = cut(rows)
    assert ids.shape == (128, 5) and ids[0].tolist() == [0, 1, 2, 3, 4] and int(ids[-1, 0]) // 1000 == 398
    assert cut(rows[:1]).shape == (1, 5)


KILL = """
import os, sys
from fewbits.finetune import Adapter, Rows, Training, finetune
at = int(sys.argv[4])
def tell(event):
    if event["event"] == "step" and event["step"] == at:
        os._exit(9)
finetune(sys.argv[1], sys.argv[2], sys.argv[3], rows=Rows(48), adapter=Adapter(r=4, alpha=8),
         training=Training(steps=6, batch=2, lr=5e-3, save_steps=2, optimizer=sys.argv[5]), on_event=tell)
"""


@pytest.mark.parametrize(("at", "optimizer"), [(1, "adamw"), (5, "paged-adamw-8bit")])
def test_killed_and_resumed_gives_the_same_losses(
    at: int, optimizer: str, run: tuple[Any, Path], examples: Path, tmp_path: Path
) -> None:
    base, out = run[0].base, tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILL, base, str(out), str(examples), str(at), optimizer])
    assert killed.returncode == 9 and not (out / "adapter_config.json").exists()
    training = Training(steps=6, batch=2, lr=5e-3, save_steps=2, optimizer=optimizer)
    how: dict[str, Any] = {"rows": ROWS, "adapter": Adapter(r=4, alpha=8), "training": training}
    finetune(base, out, examples, **how, resume=True)
    whole = tmp_path / "whole"
    finetune(base, whole, examples, **how)
    # BLAS may round otherwise where memory is aligned otherwise: equal but for the last bit
    assert log(out) == pytest.approx(log(whole), rel=1e-6)
    ours, theirs = (load_file(p / "adapter_model.safetensors") for p in (out, whole))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_cut_short_is_ignored(run: tuple[Any, Path], examples: Path, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run[1], out)
    last = newest(out / CHECKPOINTS)
    assert last is not None and last.name == "checkpoint-6"
    (last / "whole").unlink()
    (last / "optimizer.pt").write_bytes(b"half")
    before = log(out)
    finetune(dense, out, examples, rows=ROWS, training=FEW, adapter=Adapter(r=4, alpha=8), resume=True)
    assert log(out) == before


def test_resume_wants_the_same_request(run: tuple[Any, Path], dense: Path, examples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run[1], out)
    how: dict[str, Any] = {"rows": ROWS, "training": FEW, "adapter": Adapter(r=4, alpha=8)}
    with pytest.raises(RequestError, match=r"adapter\.r was 4, now 8"):
        finetune(dense, out, examples, **how | {"adapter": Adapter(r=8, alpha=8)}, resume=True)
    with pytest.raises(RequestError, match="--overwrite"):
        finetune(dense, out, examples, **how)
    with pytest.raises(RequestError, match="no run to go on with"):
        finetune(dense, dense, examples, **how, resume=True)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_adapter(
    run: tuple[Any, Path], examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbits.finetune import loss

    calls, real = [0], loss.Loss.__call__

    def poisoned(self: Any, batch: Any, count: Any = None) -> Any:
        calls[0] += 1
        return real(self, batch, count) * (float("nan") if calls[0] == 4 else 1)

    monkeypatch.setattr(loss.Loss, "__call__", poisoned)
    out = tmp_path / "out"
    how: dict[str, Any] = {"rows": ROWS, "training": FEW, "adapter": Adapter(r=4, alpha=8)}
    with pytest.raises(FewbitsError, match=r"the loss of step 4 is not finite; the adapter as it was before it is in"):
        finetune(run[0].base, out, examples, **how)
    monkeypatch.undo()
    three = tmp_path / "three"
    finetune(run[0].base, three, examples, **how | {"training": Training(steps=3, batch=2, lr=5e-3, warmup=0.18)})
    a, b = (load_adapter(load(run[0].base, dtype=torch.float32)[0], p) for p in (out, three))
    assert len(log(out)) == 3
    torch.testing.assert_close(logits(a), logits(b), rtol=1e-5, atol=1e-5)


def test_a_step_that_breaks_the_adapter(run: tuple[Any, Path], examples: Path, tmp_path: Path) -> None:
    training = Training(steps=6, batch=2, lr=1e30, warmup=0.5, save_steps=1, max_grad_norm=0)
    with pytest.raises(FewbitsError, match=r"is not finite; the step before broke the adapter; that of checkpoint-"):
        finetune(run[0].base, tmp_path / "out", examples, rows=ROWS, training=training)


def test_the_command(dense: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["finetune", str(dense), str(tmp_path / "out"), "--data", str(examples)]
    assert main([*argv, "--steps", "2", "--batch", "2", "--seq-len", "48", "--r", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["steps"] == 2 and found["method"] == "qlora" and found["peak_rss_bytes"] > 0
    assert "Warning" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.jsonl"], "no data at"),
        (["--data", "EMPTY"], "holds no examples"),
        (["--seq-len", "500"], "the model has 128 positions"),
        (["--grid", "nf5"], "did you mean 'nf4'"),
        (["--method", "full"], "allowed: qlora, lora"),
        (["--r", "0"], "--r 0 is not a rank"),
        (["--base-method", "awq"], "moves scales between layers"),
        (["--base-method", "gptq", "--method", "lora"], "lora has none of few bits"),
        (["--optimizer", "sgd"], "allowed: adamw, paged-adamw"),
        (["--optimizer-memory", "1GB"], "give --optimizer paged-adamw"),
        (["--targets", "query"], "allowed: all-linear, down_proj"),
        (["--dtype", "float16"], "allowed: float32, bfloat16"),
    ],
)
def test_wrong_requests_are_one_line(
    options: list[str], message: str, dense: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    options = [str(tmp_path / "empty.jsonl") if o == "EMPTY" else o for o in options]
    argv = ["finetune", str(dense), str(tmp_path / "out"), "--data", str(examples), "--seq-len", "48", *options]
    assert main(argv) == 2 and not (tmp_path / "out").exists()
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and message in lines[0]


def test_without_peft(dense: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.finetune import base

    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'fewbits\[finetune\]'"):
        finetune(dense, tmp_path / "out", examples)
