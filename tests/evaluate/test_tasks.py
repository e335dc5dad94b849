"""Tasks through lm-eval, against log-likelihoods that the test computes itself; wrong files are named without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbits import api
from fewbits.cli import main
from fewbits.errors import RequestError
from fewbits.evaluate.tasks import tasks

QUESTIONS = [
    ("the quick brown fox", ["jumps over", "dog", "sleeps all day"], 0),
    ("a lazy dog", ["fox", "sleeps", "quick brown"], 1),
    ("over a lazy", ["dog and sleeps", "the"], 0),
    ("all day", ["long", "jumps the quick", "and"], 2),
    ("brown", ["fox jumps", "lazy dog"], 1),
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "animals.jsonl"
    lines = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS]
    path.write_text("\n".join(lines) + "\n")
    return path


@torch.no_grad()
def accuracy(path: Path) -> tuple[float, float]:
    """The share of questions whose right choice has the largest log-likelihood, whole and per byte."""
    from fewbits import load

    model, tokenizer = load(path)
    right = [0, 0]
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            start = len(tokenizer(question)["input_ids"])
            ids = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
            logp = model(ids).logits[0, :-1].float().log_softmax(-1)
            scores.append(float(logp.gather(-1, ids[0, 1:, None])[start - 1 :].sum()))
        per_byte = [s / len(c) for s, c in zip(scores, choices, strict=True)]
        for k, s in enumerate((scores, per_byte)):
            right[k] += s.index(max(s)) == answer
    return right[0] / len(QUESTIONS), right[1] / len(QUESTIONS)


def test_local_questions_on_a_dense_and_a_quantized_model(
    reference: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    out = tmp_path / "int3"
    api.quantize(reference, out, method="rtn", bits=3, group_size=32)
    argv = ["eval", str(out), "--tasks", str(questions), "--reference", str(reference), "--dtype", "float32", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key, path in (("tasks", out), ("reference_tasks", reference)):
        scores = found[key]["animals"]
        assert (scores["acc"], scores["acc_norm"]) == accuracy(path)
        assert scores["samples"] == len(QUESTIONS)
    assert tasks(reference, [str(questions)], limit=2)["animals"]["samples"] == 2


def test_an_unknown_task(reference: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(RequestError, match="'no_such_task' is unknown to lm-eval"):
        tasks(reference, ["no_such_task"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 has no 'question'"),
        ('{"question": "q", "choices": ["a", "b"]}', "line 2 has no 'answer'"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "at least two choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer 2, which is the place of none of its 2"),
    ],
)
def test_a_line_that_is_no_question(questions: Path, line: str, expected: str) -> None:
    first = questions.read_text().splitlines()[0]
    questions.write_text(f"{first}\n{line}\n")
    with pytest.raises(RequestError, match=expected):
        tasks("anywhere", [str(questions)])


def test_requests_that_ask_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.yaml").write_text("dataset_path: x\nprocess: !function f.g\n")
    for wanted, expected in ((str(tmp_path / "t.yaml"), "has no 'task: NAME'"), ("", "names none")):
        with pytest.raises(RequestError, match=expected):
            tasks("anywhere", [wanted])
    assert main(["eval", "anywhere", "--limit", "3"]) == 2
    assert "--tasks" in capsys.readouterr().err
