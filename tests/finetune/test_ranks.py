"""Two processes on the CPU (gloo) train as one with twice the batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits.finetune.train import LOG

COMMON = ["--steps", "4", "--lr", "5e-3", "--seq-len", "48", "--rank", "4", "--dropout", "0", "--save-steps", "2"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
LAUNCH += ["--rdzv-endpoint", "localhost:0"]


def run(command: list[str], *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, args)], check=False, capture_output=True, text=True, timeout=300)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(dense: Path, examples: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    given = ["-m", "fewbits", "finetune", dense]
    how = ["--data", examples, *COMMON, "--optimizer", "paged-adamw"]
    done = run([sys.executable], *given, one, *how, "--batch", 4)
    assert not done.returncode, done.stderr[-2000:]
    done = run(LAUNCH, *given, two, *how, "--batch", 2, "--json")
    assert not done.returncode, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 1  # the first process speaks for both
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-4, atol=0)
    a, b = (load_file(out / "adapter_model.safetensors") for out in (one, two))
    for name, t in a.items():
        torch.testing.assert_close(b[name], t, rtol=1e-3, atol=1e-5)

    (two / "checkpoints" / "checkpoint-4" / "whole").unlink()  # as if it had been killed while it wrote the last one
    before = losses(two)
    done = run(LAUNCH, *given, two, *how, "--batch", 2, "--resume")
    assert not done.returncode, done.stderr[-3000:]
    assert losses(two) == before
