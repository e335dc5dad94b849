"""The command line: exit codes, one line per error, JSON as the last line of stdout, help."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import storage
from fewbits.cli import VERBS, main
from fewbits.cli.base import human, size
from fewbits.errors import CheckpointError, FetchError, QualityError, RequestError
from tests.tiny import tiny_model, tiny_tokenizer

Capture = pytest.CaptureFixture[str]

GENERATE = """
import sys
from fewbits import cli
sys.argv = ["fewbits", "generate", sys.argv[1], "a b", "--max-tokens", "2"]
assert cli.main() == 0
"""


def run_alone(code: str, model: Path) -> None:
    """Run ``code`` in a process of its own that finds ``model`` in its arguments."""
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def failed(capsys: Capture, argv: list[str], code: int) -> str:
    """Run, expect ``code``; returns the one error line."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    assert out == ""
    return lines[0]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense"
    path.mkdir()
    storage.save(path / "model.safetensors", {"model.layers.0.a.weight": torch.ones(4, 8)})
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return path


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_every_verb(capsys: Capture, verb: str) -> None:
    assert main([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert "Examples" in out and f"fewbits {verb} " in out and "--json" in out and "--debug" in out
    assert err == ""


def test_help_and_version(capsys: Capture) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS) and "Exit codes" in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from fewbits.cli import main; main(['--help']); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert time.perf_counter() - started < 10  # a generous bound on a shared machine: torch alone takes seconds


def test_a_command_spares_the_compiler_and_the_distribution_of_torch(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "m", vocab_size=320)
    tiny_tokenizer(model)
    code = (
        "unused = {'torch._dynamo.utils', 'torch.distributed.tensor', 'scipy', 'sympy'}\n"
        "assert not unused & set(sys.modules)\n"
        "from transformers.masking_utils import TransformGetItemToIndex\n"
        "import torch; x = torch.eye(3)\n"
        "with TransformGetItemToIndex(): assert torch.vmap(lambda i: x[i, i])(torch.arange(3)).tolist() == [1, 1, 1]\n"
        "f = torch.compile(lambda x: x + 1, backend='eager'); assert f(torch.ones(1)) == 2\n"
        "assert 'torch._dynamo.utils' in sys.modules\n"
    )
    run_alone(GENERATE + code, model)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3", "phi3", "opt", "gpt2", "mixtral"])
def test_every_family_is_built_without_what_torch_says_of_the_meta_device_in_python(
    family: str, tmp_path: Path
) -> None:
    code = (
        "import sys; from fewbits.runtime import lean; lean.spare(); lean.spare_meta()\n"
        "import fewbits; fewbits.load(sys.argv[1]); assert 'sympy' not in sys.modules\n"
    )
    run_alone(code, tiny_model(family, tmp_path / "m"))


def test_an_operator_that_is_missing_on_the_meta_device_is_fetched(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "m", vocab_size=320)
    tiny_tokenizer(model)
    config = json.loads((model / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_parameters"] = {"rope_theta": 10000.0, "original_max_position_embeddings": 64} | rope
    (model / "config.json").write_text(json.dumps(config))  # this kind of rope calls torch.where
    code = "import torch; x = torch.ones(2, device='meta'); assert torch.where(x > 0, x, x).shape == x.shape\n"
    run_alone(GENERATE + code, model)


def test_types_and_methods_are_taken_in_capitals(tmp_path: Path, capsys: Capture) -> None:
    model = tiny_model("llama", tmp_path / "m", vocab_size=320)
    tiny_tokenizer(model)
    assert main(["convert", str(model), str(tmp_path / "m.gguf"), "--type", "Q8_0"]) == 0
    assert main(["plan", str(model), "--method", "Q4_K_M"]) == 0
    assert main(["quantize", str(model), str(tmp_path / "q"), "--method", "Q8_0"]) == 0
    capsys.readouterr()


def test_a_library_leaves_torch_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "m")
    code = (
        "import sys, torch; kept = torch.compiler.disable, torch.distributed.is_available\n"
        "import fewbits; from fewbits.cli import main; fewbits.load(sys.argv[1]); main(['inspect', sys.argv[1]])\n"
        "assert (torch.compiler.disable, torch.distributed.is_available) == kept"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["quantize"], "SRC"),
        (["quantize", "a"], "OUT"),
        (["quantize", "a", "b", "--bits", "four"], "--bits"),
        (["quantize", "a", "b", "--bitz", "4"], "--bitz"),
        (["eval", "a", "b"], "b"),
        (["quantize", "a", "b", "--max-memory", "4 boxes"], "--max-memory '4 boxes' is not a size"),
        (["quantize", "a", "b", "--eval-text", "x.txt"], "--max-kl"),
        (["quantize", "a", "b", "--max-kl", "nan"], "--max-kl nan is not a limit"),
        (["generate", "a", ""], "the prompt is empty"),
        (["generate", "a", "x", "--max-tokens", "0"], "--max-tokens 0"),
        (["generate", "a", "x", "--temperature", "-1"], "--temperature -1"),
        (["generate", "a", "x", "--dtype", "floaty"], "'floaty' is unknown; give float32"),
        (["fetch", "smollm3"], "'smollm3'"),
        (["inspect", "nowhere"], "no such file or directory: nowhere"),
        (["eval", "nowhere", "--text", "nothing.txt"], "no text at 'nothing.txt'"),
    ],
)
def test_wrong_requests_exit_2(
    capsys: Capture, argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in failed(capsys, argv, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--method", "gptqq"], ["'gptqq'", "allowed: ", "rtn", "did you mean 'gptq'"]),
        (
            ["--format", "compressed_tensors"],
            ["'compressed_tensors'", "allowed: ", "mean 'compressed-tensors'?"],
        ),
        (["--bits", "4", "--format", "zip"], ["'zip'", "awq, bitsandbytes, compressed-tensors, fewbits, gguf, gptq"]),
    ],
)
def test_unknown_names_list_the_allowed_ones(capsys: Capture, dense: Path, argv: list[str], words: list[str]) -> None:
    line = failed(capsys, ["quantize", str(dense), str(dense.parent / "out"), *argv], 2)
    assert all(word in line for word in words), line
    assert not (dense.parent / "out").exists()


def test_an_unreadable_gate_text_stops_before_the_work(capsys: Capture, dense: Path) -> None:
    argv = ["quantize", str(dense), str(dense.parent / "out"), "--max-kl", "0.1", "--eval-text", "gone.txt"]
    assert "no text at 'gone.txt'" in failed(capsys, argv, 2)


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (RequestError("a is wrong;\n give b"), 2, "error: a is wrong; give b"),
        (CheckpointError("damaged"), 1, "error: damaged"),
        (FetchError("no network"), 1, "error: no network"),
        (QualityError("too far"), 3, "error: too far"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "error: disk full: /x/y; free space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: Permission denied: /x"),
        (MemoryError(), 1, "error: out of memory; give --max-memory"),
        (ZeroDivisionError("boom"), 1, "error: unexpected ZeroDivisionError: boom (run again with --debug"),
    ],
)
def test_every_failure_is_one_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: int, words: str
) -> None:
    def broken(*args: Any, **rest: Any) -> None:
        raise raised

    monkeypatch.setattr("fewbits.evaluate.census", broken)
    assert failed(capsys, ["inspect", "x"], code).startswith(words)


def test_debug_prints_the_traceback(capsys: Capture) -> None:
    assert main(["inspect", "nowhere", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and err.splitlines()[-1].startswith("error: ")


def test_an_interruption_says_how_to_go_on(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbits.cli.quantize.known", lambda *args: None)
    monkeypatch.setattr("fewbits.cli.quantize.run", interrupt)
    assert main(["quantize", "a", "b"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_inspect_json_is_the_last_line(capsys: Capture, dense: Path) -> None:
    assert main(["inspect", str(dense), "--json", "--verbose"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert len(out.splitlines()) == 1 and "model.layers.0.a" in err
    assert found["format"] == "dense" and found["bits_per_weight"] == 32.0 and found["parameters"] == 32
    assert main(["inspect", str(dense)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["truncated", "pickle"])
def test_damaged_and_pickled_models(capsys: Capture, dense: Path, damage: str) -> None:
    file = dense / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
        line = failed(capsys, ["inspect", str(dense)], 1)
    else:
        file.rename(dense / "pytorch_model.bin")
        line = failed(capsys, ["inspect", str(dense)], 2)
    assert ("model.safetensors" if damage == "truncated" else "pickle") in line


class Finished:
    """What quantization returns, without the work."""

    def to_json(self) -> dict[str, Any]:
        figures = {"bits_per_weight": 4.25, "size_bytes": 10**8, "seconds": 1.0, "peak_rss_bytes": 2 * 10**9}
        return {"out": "o", "method": "rtn", "tensors": 7} | figures


@pytest.mark.parametrize(("limit", "code"), [("0.2", 0), ("0.05", 3)])
def test_the_quality_gate(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, code: int
) -> None:
    class Measured:
        def to_json(self) -> dict[str, Any]:
            return {"kl_mean": 0.1, "perplexity": 20.0, "reference_perplexity": 16.0}

    given: dict[str, Any] = {}

    def quantize(src: str, out: Path, **options: Any) -> Finished:
        given.update(options, src=src, out=out)
        out.mkdir()
        (out / "fewbits_events.jsonl").write_text("")
        return Finished()

    monkeypatch.chdir(tmp_path)
    text = tmp_path / "t.txt"
    text.write_text("words")
    monkeypatch.setattr("fewbits.api.quantize", quantize)
    monkeypatch.setattr("fewbits.evaluate.evaluate", lambda *args, **rest: Measured())
    argv = ["quantize", "src", "out", "--method", "rtn", "--max-kl", limit, "--eval-text", str(text), "--json"]
    assert main([*argv, "--max-memory", "1.5GiB", "--affine", "--group-size", "-1", "--seed", "3"]) == code
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["kl_mean"] == 0.1 and found["bits_per_weight"] == 4.25 and found["tensors"] == 7
    assert found["ppl_ratio"] == 1.25 and found["worst"] == []
    assert ("error: KL 0.1000 is above --max-kl 0.05" in err) == (code == 3)
    assert given["max_memory"] == 3 * 2**29 and given["symmetric"] is False
    assert (given["group_size"], given["seed"], given["bits"]) == (-1, 3, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 2**32),
        ("500MB", 500 * 10**6),
        ("1.5g", 15 * 10**8),
        ("1000", 1000),
        ("64 KiB", 65536),
        (None, None),
    ],
)
def test_sizes(text: str | None, expected: int | None) -> None:
    assert size(text, "--max-memory") == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4X", "0", "1e9", "i"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(RequestError, match="as in 4GiB"):
        size(text, "--max-memory")


def test_human_sizes() -> None:
    assert [human(x) for x in (None, 5, 1234, 89_600_000, 1.2e13)] == ["-", "5 B", "1.23 kB", "89.6 MB", "12 TB"]
