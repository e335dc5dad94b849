"""Kernels under test run on the GPU, or in the interpreter when it is chosen; without either nothing is collected."""

from __future__ import annotations

import torch

from fewbits.kernels import triton

DEVICE = "cpu" if triton.interpreting() or not torch.cuda.is_available() else "cuda"
collect_ignore_glob = [] if triton.usable(torch.device(DEVICE)) else ["test_*.py"]


def pytest_configure() -> None:
    torch.set_default_device(DEVICE)
