"""Merging: the dense merge is the tuned model; rounding it again is measured, and refused where it undoes too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbits.cli import main
from fewbits.errors import QualityError, RequestError
from fewbits.finetune import Adapter, Rows, Training, finetune, load_adapter, merge_dense
from fewbits.finetune.adapter import attach
from fewbits.runtime import QuantLinear, load

IDS = torch.arange(3, 35).view(2, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def tuned(dense: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    finetune(dense, out, examples, rows=Rows(48), training=Training(steps=8, batch=2, lr=1e-2), adapter=Adapter(r=4))
    return out


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"rslora": True}])
def test_the_dense_merge_is_the_tuned_model(changes: dict[str, Any], tuned: Path, tmp_path: Path) -> None:
    base = str(tuned / "base")
    model = attach(load(base, dtype=torch.float32)[0], Adapter(r=4, **changes), base, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(merge_dense(tmp_path / "adapter", tmp_path / "merged"))
    assert not any(isinstance(m, QuantLinear) for m in merged.modules())
    torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_dense_base(dense: Path, examples: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "out", {"rows": Rows(48), "training": Training(steps=3, batch=2, lr=1e-2)}
    finetune(dense, out, examples, method="lora", **how)  # type: ignore[arg-type]
    merged = AutoModelForCausalLM.from_pretrained(merge_dense(out, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(load_adapter(load(dense)[0], out)), rtol=1e-4, atol=1e-4)


TEXT = "the quick brown fox jumps over the lazy dog and sleeps all day long. " * 12
EVAL = ["--eval-ctx", "16", "--eval-windows", "4"]


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    code = main(["merge", *argv, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else {}, err


def test_the_gate(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "t.txt", tmp_path / "out"
    text.write_text(TEXT)
    argv = [str(tuned), str(out), "--method", "rtn", "--group-size", "32", "--eval-text", str(text), *EVAL]
    code, found, _ = run([*argv, "--bits", "8"], capsys)
    assert code == 0 and 0 < found["kl_after"] < found["max_kl"] == found["kl_untuned"] / 2
    assert any(isinstance(m, QuantLinear) for m in load(out)[0].modules())
    code, found, err = run([argv[0], str(tmp_path / "bad"), *argv[2:], "--bits", "2"], capsys)
    assert code == QualityError.exit_code and "half of what tuning changed" in err
    assert not (tmp_path / "bad").exists() and not (tmp_path / "bad.merging").exists()
    code, _, err = run([argv[0], str(tmp_path / "bad"), *argv[2:], "--bits", "8", "--max-kl", "1e-9"], capsys)
    assert code == QualityError.exit_code and "above --max-kl 1e-09" in err


def test_a_dense_result(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = run([str(tuned), str(tmp_path / "out"), "--method", "none"], capsys)
    assert code == 0 and found["size_bytes"] > 0
    expected = logits(load_adapter(load(tuned / "base", dtype=torch.float32)[0], tuned))
    torch.testing.assert_close(logits(load(tmp_path / "out")[0]), expected, rtol=1e-4, atol=1e-4)


def test_wrong_requests(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ([str(tmp_path), str(tmp_path / "o")], "no adapter_config.json"),
        ([str(tuned), str(tmp_path)], "exists; choose another output"),
        ([str(tuned), str(tmp_path / "o"), "--method", "gtpq"], "did you mean 'gptq'"),
    ):
        code, _, err = run(argv, capsys)
        assert code == RequestError.exit_code and message in err
