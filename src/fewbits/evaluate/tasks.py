"""Accuracy on multiple-choice and other tasks, by EleutherAI's lm-eval on our loaded models, dense or quantized."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fewbits.errors import RequestError

FIELDS = ("question", "choices", "answer")
MISSING = "tasks need lm-eval, which is not installed; pip install 'fewbits[tasks]'"


def tasks(
    path: str | Path,
    wanted: Sequence[str],
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 1,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Figures by task and metric, as lm-eval names them (``acc``, ``acc_norm``, ``acc_stderr``), with ``samples``.

    ``wanted`` are names of lm-eval's own tasks (which it downloads), files of its YAML, or ``.jsonl`` files with one
    question per line: ``{"question": "...", "choices": ["...", ...], "answer": 0}``, where ``answer`` is the place of
    the right choice; the choice with the largest log-likelihood after the question and a space counts (``acc_norm``:
    per character).
    The first ``limit`` questions of each; ``shots`` examples before each.

    Raises RequestError when lm-eval is not installed, or for a task that does not exist or is not well-formed.
    """
    if not wanted or any(not w.strip() for w in wanted):
        raise RequestError("--tasks names none; give a task of lm-eval, a .yaml of it, or a .jsonl of questions")
    if limit is not None and limit < 1:
        raise RequestError(f"--limit {limit} asks nothing; give 1 or more")
    configs = [_config(w.strip()) for w in wanted]  # wrong files are named before lm-eval and the model are loaded
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise RequestError(MISSING if e.name in (None, "lm_eval") else f"{MISSING} ({e})") from None
    from fewbits.runtime import load

    folders = sorted({str(Path(w.strip()).parent) for w in wanted if w.strip().endswith((".yaml", ".yml"))})
    manager = TaskManager(include_path=folders or None)
    unknown = [c for c in configs if isinstance(c, str) and c not in manager.all_tasks]
    if unknown:
        raise RequestError(f"task {unknown[0]!r} is unknown to lm-eval and no file; give one of its names, or a file")
    model, tokenizer = load(path, dtype=dtype)
    if tokenizer is None:
        raise RequestError(f"{path} has no tokenizer; copy the tokenizer files of the original model into it")
    seeds = {f"{k}_random_seed": seed for k in ("numpy", "torch", "fewshot")} | {"random_seed": seed}
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=configs,
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
        **seeds,
    )
    counted = found.get("n-samples", {})
    return {
        name: _figures(scores) | {"samples": counted.get(name, {}).get("effective")}
        for name, scores in found["results"].items()
    }


def _config(wanted: str) -> str | dict[str, Any]:
    """What lm-eval calls a task: a name, or a configuration."""
    path = Path(wanted)
    if path.suffix in (".yaml", ".yml"):
        return _named(path)
    if path.suffix != ".jsonl":
        return wanted
    _check(path)
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }


def _named(path: Path) -> str:
    """The name that a YAML task gives itself; it may name functions, which lm-eval loads and this does not."""

    class Plain(yaml.SafeLoader):
        pass

    Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Plain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise RequestError(f"{path} cannot be read as a task: {e}") from None
    if not isinstance(data, dict) or not isinstance(data.get("task"), str):
        raise RequestError(f"{path} has no 'task: NAME'; give a task of lm-eval in YAML")
    return str(data["task"])


def _check(path: Path) -> None:
    """RequestError naming the first line that is no question."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"{path} cannot be read: {e}") from None
    if not lines:
        raise RequestError(f"{path} is empty; give one question per line, with {', '.join(FIELDS)}")
    for n, line in enumerate(lines, 1):
        if reason := _wrong(line):
            raise RequestError(f"{path}: line {n} {reason}; a line is like {_example()}")


def _wrong(line: str) -> str | None:
    try:
        doc = json.loads(line)
    except ValueError:
        return "is not JSON"
    lacks = [f for f in FIELDS if f not in doc] if isinstance(doc, dict) else list(FIELDS)
    if lacks:
        return f"has no {lacks[0]!r}"
    choices, answer = doc["choices"], doc["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        return "has no list of at least two choices"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f"has answer {answer!r}, which is the place of none of its {len(choices)} choices"
    return None


def _example() -> str:
    return json.dumps({"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1})


def _figures(scores: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` becomes ``acc``; a filter's name stays."""
    found = {}
    for key, value in scores.items():
        if isinstance(value, (int, float)) and key != "sample_len":
            found[key.removesuffix(",none")] = float(value)
    return found
