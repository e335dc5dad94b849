"""llama.cpp as an engine: its own tokens and logits of a GGUF file, through whatever binding is installed.

Bindings differ in what they show of llama.cpp, but each brings a shared library with the C interface of ``llama.h``.
That is called directly. Structures of settings are passed by value and grow with every version: they are treated as
opaque bytes that the library fills in, of which the first three numbers (tokens of the context, of a batch, of a
micro-batch) have stayed where they are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import CheckpointError, RequestError

LIBRARY = "FEWBITS_GGML"  # environment variable: a shared library of llama.cpp to take in place of a binding's
BINDINGS = {"xllamacpp": "xllamacpp.*", "llama_cpp": "lib/*llama.*"}
"""Packages, and where in each the shared library lies."""
CHUNK = 256  # tokens whose logits exist at once


class _Settings(ctypes.Structure):
    """A structure passed by value whose fields are the library's affair: larger than any of theirs."""

    _fields_ = (("bytes", ctypes.c_uint8 * 1024),)


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


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [type(_SILENT), _POINTER]),
    "llama_model_default_params": (_Settings, []),
    "llama_context_default_params": (_Settings, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _Settings]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Settings]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _INT, _INT]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "llama_tokenize": (
        _INT,
        [_POINTER, ctypes.c_char_p, _INT, ctypes.POINTER(_INT), _INT, ctypes.c_bool, ctypes.c_bool],
    ),
    "llama_free": (None, [_POINTER]),
    "llama_model_free": (None, [_POINTER]),
}


def find() -> Path | None:
    """The shared library of an installed binding, or the one that the environment names; None when there is none."""
    if named := os.environ.get(LIBRARY):
        return Path(named)
    for package, pattern in BINDINGS.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            files = [f for f in sorted(Path(folder).glob(pattern)) if f.suffix in (".so", ".dylib", ".dll", ".pyd")]
            if files:
                return files[0]
    return None


@cache
def library() -> Any:
    """llama.cpp. Raises RequestError when no binding is installed, or it lacks what is needed."""
    path = find()
    if path is None:
        raise RequestError(
            "engine llama.cpp needs a Python binding of llama.cpp; install one with pip install 'fewbits[llamacpp]'"
        )
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as e:
        raise RequestError(f"{path} cannot be used as llama.cpp ({str(e)[:120]}); install another binding") from None
    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    return lib


class LlamaCpp:
    """A GGUF file opened by llama.cpp; close it, or use it as a context manager.

    Raises CheckpointError when llama.cpp refuses the file.
    """

    def __init__(self, path: str | Path):
        self._model = None
        self._lib = library()
        self.path = Path(path)
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise CheckpointError(f"llama.cpp cannot load {path}; see `fewbits inspect {path} --check`")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self.words: int = self._lib.llama_vocab_n_tokens(self._vocabulary)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are recognised, none are added."""
        raw = text.encode()
        found = (_INT * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocabulary, raw, len(raw), found, len(found), False, True)
        if count < 0:
            raise CheckpointError(f"llama.cpp cannot tokenize with {self.path}")
        return found[:count]

    def logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Logits of one text from its start, float32 ``[<= CHUNK, words]`` at a time."""
        settings = self._lib.llama_context_default_params()
        struct.pack_into("<III", settings, 0, len(ids), CHUNK, CHUNK)
        context = self._lib.llama_init_from_model(self._model, settings)
        if not context:
            raise CheckpointError(f"llama.cpp cannot run {self.path} with {len(ids)} tokens")
        threads = torch.get_num_threads()
        self._lib.llama_set_n_threads(context, threads, threads)
        try:
            for start in range(0, len(ids), CHUNK):
                yield self._decode(context, ids[start : start + CHUNK])
        finally:
            self._lib.llama_free(context)

    def _decode(self, context: int, ids: Sequence[int]) -> Tensor:
        n = len(ids)
        batch = _Batch(n, (_INT * n)(*ids), logits=(ctypes.c_int8 * n)(*[1] * n))
        if self._lib.llama_decode(context, batch) != 0:
            raise CheckpointError(f"llama.cpp failed on {self.path}")
        rows = np.ctypeslib.as_array(self._lib.llama_get_logits(context), (n, self.words))
        return torch.from_numpy(rows.copy())
