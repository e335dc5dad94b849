"""llama.cpp's own quantizers: FEWBITS_GGML names a shared library that has them, FEWBITS_LLAMA_QUANTIZE the program
llama-quantize (or it is on the PATH)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@cache
def library() -> Any:
    """The library; skips the test when there is none."""
    path = os.environ.get("FEWBITS_GGML")
    if not path:
        pytest.skip("FEWBITS_GGML names no shared library with ggml_quantize_chunk")
    lib = ctypes.CDLL(path)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64] * 3
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    return lib


def quantize(number: int, row_bytes: int, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 ``[rows, row_bytes]`` of ``x`` float32 ``[rows, columns]``."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.zeros((len(x), row_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    written = library().ggml_quantize_chunk(number, x.ctypes.data, out.ctypes.data, 0, *x.shape, pointer)
    assert written == out.size
    return out


def llama_quantize(source: Path, out: Path, mixture: str, imatrix: Path | None = None, threads: int = 1) -> None:
    """Run llama-quantize on a dense GGUF file; skips the test when there is none."""
    program = os.environ.get("FEWBITS_LLAMA_QUANTIZE") or shutil.which("llama-quantize")
    if not program:
        pytest.skip("there is no llama-quantize; put it on the PATH or name it in FEWBITS_LLAMA_QUANTIZE")
    extra = ["--imatrix", str(imatrix)] if imatrix else []
    command = [program, *extra, str(source), str(out), mixture.upper(), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert not done.returncode, done.stderr[-2000:]


def logits(path: Any, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits float32 ``[tokens, vocabulary]`` of a GGUF file."""
    if not hasattr(library(), "llama_decode"):
        pytest.skip("the library of FEWBITS_GGML cannot run models")
    from fewbits.runtime.llamacpp import LlamaCpp

    with LlamaCpp(path) as model:
        return np.concatenate([rows.numpy() for rows in model.logits(ids)])
