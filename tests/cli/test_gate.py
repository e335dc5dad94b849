"""The quality gate on a real run: exit code, the output that stays, and the layers that are named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fewbits.cli import main
from fewbits.errors import QualityError
from fewbits.formats import detect
from fewbits.storage import Checkpoint
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model("llama", tmp_path_factory.mktemp("dense"), vocab_size=300)
    tiny_tokenizer(path)
    rng = random.Random(0)
    (path / "text.log").write_text(" ".join(rng.choice(["quick", "fox", "dog", "day", "jumps"]) for _ in range(600)))
    return path


def run(capsys: pytest.CaptureFixture[str], dense: Path, out: Path, *limits: str) -> tuple[int, dict, str]:  # type: ignore[type-arg]
    argv = ["quantize", str(dense), str(out), "--method", "rtn", "--bits", "3", "--group-size", "32", "--json"]
    text = ["--eval-text", str(dense / "text.log"), "--eval-ctx", "32", "--eval-windows", "4"]
    code = main([*argv, *limits, *text])
    found, err = capsys.readouterr()
    return code, json.loads(found.splitlines()[-1]), err


def errors(dense: Path, out: Path) -> dict[str, float]:
    """Relative error of every quantized weight, from the two checkpoints alone."""
    original, made = Checkpoint.open(dense), Checkpoint.open(out)
    layout = detect(json.loads((out / "config.json").read_text())["quantization_config"])
    found = {}
    for name in {n.removesuffix(".weight_packed") for n in made.names() if n.endswith(".weight_packed")}:
        parts = {n.removeprefix(f"{name}."): made.tensor(n) for n in made.names() if n.startswith(f"{name}.")}
        w = original.tensor(f"{name}.weight").double()
        found[name] = float((layout.unpack(name, parts).dense().double() - w).norm() / w.norm())
    return found


def test_three_bits_miss_a_strict_limit(capsys: pytest.CaptureFixture[str], dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, found, err = run(capsys, dense, out, "--max-kl", "0.001")
    assert code == QualityError.exit_code == 3
    assert (out / "model.safetensors").is_file() and found["out"] == str(out)
    assert found["max_kl"] == 0.001 and found["kl_mean"] > 0.001 and found["eval"]["windows"] == 4
    assert found["ppl_ratio"] == pytest.approx(found["perplexity"] / found["eval"]["reference_perplexity"])

    ours = errors(dense, out)
    order = sorted(ours, key=lambda n: -ours[n])[:5]
    assert [e["name"] for e in found["worst"]] == order
    assert [e["error"] for e in found["worst"]] == pytest.approx([ours[n] for n in order], rel=1e-3)
    last = err.splitlines()[-1]
    assert last.startswith("error: KL ") and "--max-kl 0.001" in last and "is kept" in last
    assert all(name in last for name in order)


def test_the_ratio_of_perplexities(capsys: pytest.CaptureFixture[str], dense: Path, tmp_path: Path) -> None:
    code, found, err = run(capsys, dense, tmp_path / "a", "--max-ppl-ratio", "1000", "--max-kl", "1000")
    assert code == 0 and found["max_ppl_ratio"] == found["max_kl"] == 1000 and "error: " not in err
    assert len(found["worst"]) == 5

    tight = found["ppl_ratio"] * 0.999
    code, again, err = run(capsys, dense, tmp_path / "b", "--max-ppl-ratio", str(tight))
    assert code == 3 and again["ppl_ratio"] == found["ppl_ratio"] and "max_kl" not in again
    assert f"--max-ppl-ratio {tight:g}" in err.splitlines()[-1]


@pytest.mark.parametrize("limit", ["0", "-1", "nan"])
def test_a_limit_that_is_none(capsys: pytest.CaptureFixture[str], limit: str) -> None:
    assert main(["quantize", "a", "b", "--max-ppl-ratio", limit]) == 2
    assert "--max-ppl-ratio" in capsys.readouterr().err
