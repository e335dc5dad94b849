"""A comparison on a tiny model: every figure is what the single verbs give, and killed it goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewbits import api
from fewbits.cli import main
from fewbits.compare import Cell, Comparison, Setting, cells, figures, markdown, rows
from fewbits.compare.cell import fitting
from fewbits.errors import RequestError
from fewbits.evaluate import evaluate
from tests.tiny import tiny_model, tiny_tokenizer

HOW = {"ctx": 32, "windows": 4, "samples": 6, "seq_len": 16, "compute": "fp32", "speed": None}


def words(seed: int, path: Path) -> Path:
    rng = random.Random(seed)
    path.write_text(" ".join(rng.choice(["quick", "fox", "dog", "day", "jumps", "over"]) for _ in range(900)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model("llama", tmp_path_factory.mktemp("compared"), vocab_size=300)
    tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words(0, tmp_path_factory.mktemp("texts") / "text.txt")


def test_cells() -> None:
    found = cells(["rtn", "q4_k_m", "nf4"], [4, 3], [], 32)
    assert [c.name for c in found] == ["rtn-4", "rtn-3", "q4_k_m", "nf4"]
    assert found[0] == Cell("rtn", 4, 32) and found[2] == Cell("q4_k_m")
    assert [c.name for c in cells(["gptq"], [4], ["gptq", "fewbits"])] == ["gptq-4-gptq", "gptq-4-fewbits"]
    assert [c.bits for c in cells(["gptq"])] == [None]
    with pytest.raises(RequestError, match="'rtn' is there twice"):
        cells(["rtn", "rtn"])
    with pytest.raises(RequestError, match="did you mean"):
        cells(["gptqq"])


def test_groups_that_fit_the_model() -> None:
    assert fitting(Cell("gptq", 4), (576, 1536)) == Cell("gptq", 4, 64)
    assert fitting(Cell("gptq", 4), (1024, 4096)) == Cell("gptq", 4)
    assert fitting(Cell("gptq", 4, 128), (576,)) == Cell("gptq", 4, 128)  # what was asked for stays
    assert fitting(Cell("rtn", 4), (100,)).group_size == 16  # nothing fits: the format says why
    for fixed in ("w8a8", "q4_k_m", "fp8-block", "nf4"):
        assert fitting(Cell(fixed), (100,)) == Cell(fixed)


@pytest.fixture(scope="module")
def compared(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "compared"
    domains = {"other": str(words(1, text.parent / "other.txt"))}
    setting = Setting(text=str(text), domains=domains, calibration=str(text), **HOW)  # type: ignore[arg-type]
    wanted = [*cells(["rtn", "gptq", "awq"], [3], group_size=32), Cell("smoothquant"), Cell("nf4")]
    return out, Comparison(str(model), out, wanted, setting).run()


def test_each_cell_is_what_the_single_verbs_give(
    compared: tuple[Path, dict[str, Any]], model: Path, text: Path, tmp_path: Path
) -> None:
    out, found = compared
    assert [c["name"] for c in found["cells"]] == ["rtn-3", "gptq-3", "awq-3", "smoothquant", "nf4"]
    assert not any(c["refused"] for c in found["cells"])
    for cell, stream in (("gptq-3", "original"), ("smoothquant", "quantized")):
        known = next(c for c in found["cells"] if c["name"] == cell)
        group = {k: known[k] for k in ("bits", "group_size")}
        again = api.quantize(
            model, tmp_path / cell, method=known["method"], stream=stream, calibration=text, samples=6, seq_len=16,
            compute="fp32", **group,
        )  # fmt: skip
        for file in ("model.safetensors", "fewbits_plan.yaml", "README.md"):
            assert (tmp_path / cell / file).read_bytes() == (out / "cells" / cell / file).read_bytes()
        assert known["quantize"]["bits_per_weight"] == again.bits_per_weight  # type: ignore[union-attr]
        assert known["plan"] == (tmp_path / cell / "fewbits_plan.yaml").read_text()
        for name, file in found["texts"].items():
            alone = evaluate(tmp_path / cell, file, 32, 4, model).to_json()
            same = ("perplexity", "kl_mean", "kl_p99", "top1", "kl_mean_ci95", "reference_perplexity")
            assert {k: known["eval"][name][k] for k in same} == {k: alone[k] for k in same}
    own = evaluate(model, text, 32, 4)
    assert found["reference"]["eval"]["text"]["perplexity"] == own.perplexity


def test_the_pass_is_shared(compared: tuple[Path, dict[str, Any]]) -> None:
    _, found = compared
    assert list(found["shared"]["cells"]) == ["gptq-3", "awq-3"]
    made = {c["name"]: c["quantize"] for c in found["cells"]}
    for name, own in found["shared"]["cells"].items():
        assert made[name]["seconds"] == pytest.approx(found["shared"]["seconds"] + own)
    assert "own_seconds" not in made["rtn-3"]


def test_the_table(compared: tuple[Path, dict[str, Any]]) -> None:
    _, found = compared
    head, original, *body = rows(found)
    assert head[-2:] == ["KL other", "quantize, s"] and original[:2] == ["original", "dense"]
    kls = {c["name"]: c["eval"]["text"]["kl_mean"] for c in found["cells"]}
    assert [r[0] for r in body] == sorted(kls, key=lambda n: kls[n])
    at = head.index("KL")
    assert [r[at] for r in body] == [f"{k:.4f}" for k in sorted(kls.values())]
    lines = markdown(found).splitlines()
    assert lines[0].startswith("| method | format | bits/weight |") and len({x.count("|") for x in lines[:7]}) == 1
    assert "shared one pass" in markdown(found)


def test_nothing_is_done_twice(
    compared: tuple[Path, dict[str, Any]], model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = compared
    setting = Setting(text=str(text), domains=found["identity"]["domains"], calibration=str(text), **HOW)  # type: ignore[arg-type]
    asked = [Cell(c["method"], c["bits"], c["group_size"], c["format"]) for c in found["cells"]]
    monkeypatch.setattr("fewbits.api.quantize", None)
    monkeypatch.setattr("fewbits.compare.run.Reference", None)
    assert Comparison(str(model), out, asked, setting).run() == found
    regrouped = [Cell("rtn", 3, 16)]
    with pytest.raises(RequestError, match=r"rtn-3 in .* has groups of 32, 16 is asked for"):
        Comparison(str(model), out, regrouped, setting).run()
    with pytest.raises(RequestError, match=r"differs in samples.*--overwrite"):
        Comparison(str(model), out, asked, Setting(**(setting.__dict__ | {"samples": 5})))


def test_a_refused_cell_is_a_row_and_no_failure(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", str(model), "--out", str(tmp_path / "c"), "--methods", "rtn,nf4", "--formats", "gptq"]
    argv += ["--text", str(text), "--ctx", "32", "--windows", "2", "--group-size", "32", "--no-speed", "--no-html"]
    assert main([*argv, "--calibration", str(text), "--samples", "2", "--seq-len", "16", "--discard", "--json"]) == 0
    out, err = capsys.readouterr()
    found = {c["name"]: c for c in json.loads(out.splitlines()[-1])["cells"]}
    assert "cannot store" in found["nf4-gptq"]["refused"] and found["rtn-gptq"]["eval"]["text"]["kl_mean"] > 0
    assert "nf4-gptq is left out" in err and not (tmp_path / "c" / "cells" / "rtn-gptq").exists()
    assert "| nf4-gptq | refused |" in (tmp_path / "c" / "table.md").read_text()


def test_requests_that_cannot_be(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "t.txt").write_text("words")
    text = ["--text", str(tmp_path / "t.txt")]
    for argv, expected in (
        (["--out", str(tmp_path / "full"), *text], "holds no comparison"),
        (["--out", str(tmp_path / "c"), "--domains", "code"], "is not NAME=FILE"),
        (["--out", str(tmp_path / "c"), "--stream", "both"], "unknown stream 'both'"),
        (["--out", str(tmp_path / "c"), "--bits", "four"], "--bits 'four'"),
    ):
        assert main(["compare", str(model), *argv]) == 2
        assert expected in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "gone"), "--out", str(tmp_path / "c"), *text]) == 2
    assert not (tmp_path / "c").exists()


def test_the_histogram_counts_every_prediction() -> None:
    kl = torch.tensor([0.0, 1e-12, 3e-8, 0.5, 99.0, 1e5], dtype=torch.float64)
    found = figures.histogram(kl)
    assert sum(found["counts"]) == 6 and len(found["edges"]) == len(found["counts"]) + 1
    assert found["counts"][0] == 2 and found["counts"][-1] == 2
    at = int(np.searchsorted(found["edges"], np.log10(0.5))) - 1
    assert found["counts"][at] == 1


def test_the_worst_tokens_in_context() -> None:
    class Letters:
        def decode(self, ids: torch.Tensor) -> str:
            return "".join(chr(97 + int(i)) for i in ids)

    ids = torch.arange(20).reshape(2, 10)
    kl = torch.zeros(18, dtype=torch.float64)
    kl[[4, 5, 12]] = torch.tensor([2.0, 1.5, 3.0], dtype=torch.float64)  # 4 and 5 are one neighbourhood
    half = torch.full((18,), 2.0, dtype=torch.float64).log()
    found = figures.worst(torch.stack([half, 2 * half, kl, kl * 0]), ids, Letters(), 2)
    assert [(t["token"], t["kl"]) for t in found] == [("o", 3.0), ("f", 2.0)]
    assert (found[1]["before"], found[1]["after"], found[1]["window"]) == ("abcde", "ghij", 0)
    assert (found[0]["p"], found[0]["q"], found[0]["same"]) == pytest.approx((0.5, 0.25, False))


@pytest.mark.slow
def test_killed_it_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    """kill -9 again and again: in the end every file of a checkpoint is what an undisturbed comparison writes."""
    more = ["--methods", "rtn,gptq,awq", "--bits", "3", "--group-size", "32", "--text", str(text), "--ctx", "32"]
    more += ["--windows", "4", "--calibration", str(text), "--samples", "6", "--seq-len", "16", "--compute", "fp32"]
    command = [sys.executable, "-m", "fewbits", "compare", str(model), "--no-speed", "--no-html", *more, "--out"]

    def start(out: Path) -> Any:
        return subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)

    def done(step: str) -> bool:
        folder = tmp_path / "killed"
        if step == "block":
            return any(folder.glob("cells/*.partial/block-00000.safetensors"))
        return any(f'"{step}":' in f.read_text() for f in folder.glob("cells/*-3.json"))

    assert start(tmp_path / "whole").wait() == 0
    killed = 0
    for step in ("block", "quantize", "eval"):
        process = start(tmp_path / "killed")
        while not done(step) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 3 and start(tmp_path / "killed").wait() == 0
    for name in ("rtn-3", "gptq-3", "awq-3"):
        a, b = (tmp_path / x / "cells" / name for x in ("whole", "killed"))
        assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}
        first, second = (json.loads((tmp_path / x / "cells" / f"{name}.json").read_text()) for x in ("whole", "killed"))
        assert first["eval"]["text"]["kl_mean"] == second["eval"]["text"]["kl_mean"]
