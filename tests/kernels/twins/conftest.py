"""Kernels under test run on the GPU, or in the interpreter when it is chosen; without either nothing is collected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fewbits.kernels import triton

DEVICE = "cpu" if triton.interpreting() or not torch.cuda.is_available() else "cuda"
collect_ignore_glob = [] if triton.usable(torch.device(DEVICE)) else ["test_*.py"]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Tensors without a device are made where the kernels run."""
    with torch.device(DEVICE):
        yield
