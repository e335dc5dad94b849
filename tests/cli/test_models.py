"""The verbs that run a model, on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbits.cli import main
from tests.tiny import tiny_model, tiny_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model("llama", tmp_path_factory.mktemp("model"), vocab_size=300)
    tiny_tokenizer(path)
    return path


def test_generate_takes_the_likeliest_tokens(capsys: Capture, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["generate", str(model), "the quick", "--max-tokens", "6", "--json"]) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    start, plain = ids.shape[1], AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for _ in range(6):
            best = plain(ids).logits[0, -1].argmax().view(1, 1)
            ids = torch.cat([ids, best], 1)
            if int(best) == plain.config.eos_token_id:
                break
    assert found["text"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert found["tokens"] == ids.shape[1] - start and found["prompt"] == "the quick"


def test_generate_streams_to_stdout_and_a_seed_repeats(capsys: Capture, model: Path) -> None:
    argv = ["generate", str(model), "the lazy", "--max-tokens", "5", "--temperature", "1.5", "--seed", "7"]
    texts = []
    for _ in range(2):
        assert main(argv) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the lazy")


def test_chat_needs_a_template(capsys: Capture, model: Path) -> None:
    assert main(["generate", str(model), "hello", "--chat"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --chat needs a chat template")


def test_eval_prints_a_table_and_json(capsys: Capture, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    argv = ["eval", str(model), "--text", str(text), "--ctx", "16", "--windows", "3", "--reference", str(model)]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    wanted = {"perplexity", "kl_mean", "kl_p99", "top1", "tokens", "ctx", "size_bytes", "bits_per_weight"}
    assert wanted <= found.keys() and found["kl_mean"] == 0.0 and found["tokens"] == 45
    assert "perplexity" in err and "window 3/3" in err
    assert main([*argv, "--windows", "4000"]) == 2
    assert "windows of 16 need 64000" in capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_writes_nothing(capsys: Capture, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["quantize", str(model), str(out), "--method", "rtn", "--bits", "4", "--group-size", "32", "--dry-run"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["dry_run"] is True and found["tensors"] == 14
    assert found["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 32)
    assert list(tmp_path.iterdir()) == []


def test_inspect_studies_activations(capsys: Capture, model: Path, tmp_path: Path) -> None:
    text, html = tmp_path / "t.txt", tmp_path / "page.html"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    argv = ["inspect", str(model), "--activations", "--text", str(text), "--samples", "3", "--seq-len", "16"]
    assert main([*argv, "--zeroing", "0.01,0.1", "--windows", "2", "--html", str(html), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["format"] == "dense" and len(found["activations"]["layers"]) == 8
    assert [z["share"] for z in found["activations"]["zeroing"]] == [0.01, 0.01, 0.1, 0.1]
    assert "kurtosis" in err and "random" in err and html.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--zeroing", "0.1"], "give --activations too"),
        (["--activations", "--zeroing", "a"], "numbers between 0 and 1"),
        (["--activations", "--zeroing", "0.1,2"], "numbers between 0 and 1"),
        (["--activations", "--html", "/no/such/folder/x.html"], "no such directory"),
        (["--activations", "--text", "/no/such/text"], "no such calibration text"),
        (["--activations", "--text", "TEXT", "--samples", "5000"], "--samples"),
        (["--activations", "--text", "TEXT", "--samples", "1", "--seq-len", "100"], "64 positions"),
    ],
)
def test_inspect_refuses_in_one_line(capsys: Capture, model: Path, tmp_path: Path, argv: list[str], words: str) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    assert main(["inspect", str(model), *(str(text) if a == "TEXT" else a for a in argv)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last
