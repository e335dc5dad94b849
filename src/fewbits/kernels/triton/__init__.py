"""Twins of the products in :mod:`fewbits.kernels.gpu`, in Triton. Nothing imports Triton until a tensor needs it.

``product.py`` holds the loops, the other files say how one tile of a weight is decoded (``ints``, ``table``, ``byte``,
``levels``, ``nested``), how two one-byte operands are multiplied (``scaled``), how single weights are (``sparse``) and
how rows are quantized (``rows``).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

_log = logging.getLogger("fewbits.kernels")
_LAUNCHERS = {"product": "product", "scaled": "scaled", "quantize_rows": "rows", "sparse_product": "sparse"}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter; Triton decides it once, when a kernel is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported; it is not imported to find out."""
    return find_spec("triton") is not None


def missing() -> str:
    """Why twins cannot run on GPUs here; empty when they can."""
    if os.environ.get("FEWBITS_KERNELS") == "reference":
        return "FEWBITS_KERNELS=reference"
    if not installed():
        return "Triton is not installed; pip install 'fewbits[gpu]'"
    return ""


def usable(device: torch.device) -> bool:
    """Whether twins take tensors on ``device``; on a GPU where they cannot, the log says why, once."""
    if device.type == "cpu":
        return interpreting() and os.environ.get("FEWBITS_KERNELS") == "triton" and not missing()
    if device.type != "cuda":
        return False
    why = missing()
    if why:
        _say(why)
    return not why


@functools.cache
def launcher(name: str) -> Callable[..., Any]:
    """The function ``name`` that prepares and starts kernels."""
    return getattr(import_module(f"fewbits.kernels.triton.{_LAUNCHERS[name]}"), name)


@functools.cache
def native_fp8(device: torch.device) -> bool:
    """Whether the device multiplies and converts float8_e4m3fn itself (NVIDIA from compute capability 8.9)."""
    if device.type == "cpu":
        return interpreting()
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _say(why: str) -> None:
    _log.warning("quantized layers on the GPU run the plain-torch reference, which is slower: %s", why)
