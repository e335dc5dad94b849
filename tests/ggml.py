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


class _Any(ctypes.Structure):
    """A structure passed by value whose fields are the library's affair: larger than any of theirs."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def logits(path: Any, ids: list[int], vocabulary: int) -> np.ndarray:
    """llama.cpp's logits float32 ``[tokens, vocabulary]`` of a GGUF file for at most 512 tokens."""
    lib = library()
    if not hasattr(lib, "llama_decode"):
        pytest.skip("the library of FEWBITS_GGML cannot run models")
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *a: None)
    lib.llama_log_set(silent, None)
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Any
    lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes, lib.llama_init_from_model.argtypes = (
        [ctypes.c_char_p, _Any],
        [ctypes.c_void_p, _Any],
    )
    lib.llama_decode.argtypes, lib.llama_get_logits.argtypes = [ctypes.c_void_p, _Batch], [ctypes.c_void_p]
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model, f"llama.cpp cannot load {path}"
    context = lib.llama_init_from_model(model, lib.llama_context_default_params())
    batch = _Batch(len(ids), (ctypes.c_int32 * len(ids))(*ids), logits=(ctypes.c_int8 * len(ids))(*[1] * len(ids)))
    assert context and lib.llama_decode(context, batch) == 0
    found = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), vocabulary)).copy()
    for free, what in ((lib.llama_free, context), (lib.llama_model_free, model)):
        free.argtypes = [ctypes.c_void_p]
        free(what)
    return found
