"""The op table: which implementation of each op runs here, and why.

An op is a Python function with a schema and checks; its plain-torch *reference* is the specification and works on
any device; its native implementation is C++ in the extension ``fewbits.kernels._C``. ``FEWBITS_KERNELS=reference``
turns C++ off; ``triton`` does too and runs the Triton twins (:mod:`fewbits.kernels.gpu`) on any device, on the CPU in
Triton's interpreter; ``FEWBITS_ISA=portable|avx2|avx512|amx`` lowers the instruction set that C++ may use.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch  # before the extension: both then share the OpenMP runtime that torch brings
from torch import Tensor

from fewbits.errors import RequestError

LEVELS = ("portable", "avx2", "avx512", "amx")


@dataclass(frozen=True)
class Op:
    """An entry: its schema in words, and what its native implementation uses at each level of instruction set."""

    name: str
    schema: str
    uses: Callable[[str], str]


@dataclass(frozen=True)
class Choice:
    """Which implementation is chosen (``native``, ``triton`` or ``reference``), and why."""

    implementation: str
    why: str


def _load() -> tuple[Any, str]:
    wanted = os.environ.get("FEWBITS_KERNELS", "auto")
    if wanted not in ("auto", "reference", "triton"):
        raise RequestError(f"FEWBITS_KERNELS={wanted!r} is unknown; allowed: auto, reference, triton")
    level = os.environ.get("FEWBITS_ISA")
    if level is not None and level not in LEVELS:
        raise RequestError(f"FEWBITS_ISA={level!r} is unknown; allowed: {', '.join(LEVELS)}")
    if wanted != "auto":
        return None, f"FEWBITS_KERNELS={wanted}"
    try:
        return import_module("fewbits.kernels._C"), ""
    except ImportError as error:
        why = f"the C++ extension is not importable ({error})"
        warnings.warn(f"{why}; plain torch is used, which is slower. Reinstall with a C++ compiler", stacklevel=2)
        return None, why


C, _missing = _load()
_ops: dict[str, Op] = {}
_twins: dict[str, Op] = {}


def register(name: str, schema: str, uses: Callable[[str], str]) -> None:
    """Add an op. ``uses(level)`` says what its C++ code uses at that level, for :func:`info`."""
    _ops[name] = Op(name, schema, uses)


def register_twin(name: str, schema: str, uses: str) -> None:
    """Add an op of :mod:`fewbits.kernels.gpu`, whose fast implementation is in Triton; ``uses`` says how it works."""
    _twins[name] = Op(name, schema, lambda level: uses)


def twins() -> dict[str, Op]:
    """The ops that have a twin in Triton."""
    return _twins


def native(*tensors: Tensor | None) -> bool:
    """Whether C++ can take these tensors: the extension is there, and all of them are on the CPU."""
    return C is not None and all(t is None or t.device.type == "cpu" for t in tensors)


def threads() -> int:
    """Threads that a C++ op uses: torch's number, passed explicitly on every call."""
    return torch.get_num_threads()


@cache
def multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively; elsewhere float32 products are faster in torch."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()


def level() -> str:
    """The instruction set that C++ uses, one of ``LEVELS``; ``portable`` when there is no C++."""
    return "portable" if C is None else str(C.isa())


def info() -> dict[str, Choice]:
    """For each op: the implementation chosen for CPU tensors, and why. Elsewhere the reference runs, or a twin
    (:func:`fewbits.kernels.gpu.info`)."""
    if C is None:
        return {name: Choice("reference", _missing) for name in _ops}
    return {name: Choice("native", f"CPU has {C.detected_isa()}: {op.uses(C.isa())}") for name, op in _ops.items()}


def schemas() -> dict[str, str]:
    """The schema of each op."""
    return {name: op.schema for name, op in _ops.items()}


def require(condition: bool, message: str) -> None:
    """Raise :class:`RequestError` with ``message`` unless ``condition``."""
    if not condition:
        raise RequestError(message)


def shape(t: Tensor | None) -> str:
    """A tensor in an error message: ``float32[3, 4] on cpu``."""
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}" if t is not None else "none"
