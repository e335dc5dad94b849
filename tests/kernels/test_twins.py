"""Runs ``tests/kernels/twins`` in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbits import kernels
from fewbits.kernels import gpu, triton

HERE = Path(__file__).parent / "twins"
INTERPRETER = {"TRITON_INTERPRET": "1", "FEWBITS_KERNELS": "triton", "OMP_NUM_THREADS": "1"}


def test_the_twins_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: no wheel for this platform")
    command = [sys.executable, "-m", "pytest", str(HERE), "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | INTERPRETER, capture_output=True, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-2000:]


def test_nothing_imports_triton_until_a_tensor_needs_it() -> None:
    code = """
import sys, torch, fewbits
from fewbits.kernels import gpu
w = gpu.pack_int(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1), None, 4, -1)
gpu.linear(torch.ones(1, 8), w)
print([m for m in sys.modules if m.split('.')[0] == 'triton'])
"""
    environment = {k: v for k, v in os.environ.items() if k not in INTERPRETER}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_table_says_what_runs_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_KERNELS", "reference")
    chosen = gpu.info()
    assert set(chosen) == {"linear", "scaled_linear", "quantize_rows", "sparse_matmul"}
    assert chosen["linear"] == kernels.Choice("reference", "FEWBITS_KERNELS=reference")
    monkeypatch.delenv("FEWBITS_KERNELS")
    monkeypatch.setattr(triton, "installed", lambda: False)
    assert "pip install 'fewbits[gpu]'" in gpu.info()["linear"].why
    monkeypatch.setattr(triton, "installed", lambda: True)
    assert gpu.info()["linear"].implementation == "triton"


def test_falling_back_on_a_gpu_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton, "installed", lambda: False)
    triton._say.cache_clear()
    assert not any(triton.usable(torch.device("cuda", i)) for i in (0, 1, 0))
    assert len(caplog.records) == 1 and "fewbits[gpu]" in caplog.records[0].getMessage()
    assert not triton.usable(torch.device("cpu")) and not triton.usable(torch.device("meta"))
    assert len(caplog.records) == 1
