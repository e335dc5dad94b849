"""Who computes a model: our own forward pass, ours with llama.cpp's roundings, or llama.cpp itself.

An engine gives what :func:`fewbits.load` gives, a module and a tokenizer, so that whoever runs models need not know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import RequestError
from fewbits.formats import gguf, gguf_import
from fewbits.runtime import llamacpp, loading

Loaded = tuple[Any, Any]


def _ours(path: str | Path, dtype: torch.dtype) -> Loaded:
    from fewbits.runtime import load

    return load(path, dtype=dtype)


def _rounding(path: str | Path, dtype: torch.dtype) -> Loaded:
    from fewbits.runtime import ggml_inputs

    file = _file(path)
    model, tokenizer = _ours(path, dtype)
    ggml_inputs.install(model, file)
    return model, tokenizer


def _llama_cpp(path: str | Path, dtype: torch.dtype) -> Loaded:
    """The tokenizer is ours, so that texts have the same tokens in every engine."""
    llamacpp.library()
    file = _file(path)
    return LlamaCppModule(file), loading.gguf_tokenizer(file)


ENGINES: dict[str, Callable[[str | Path, torch.dtype], Loaded]] = {
    "fewbits": _ours,
    "fewbits-q8": _rounding,
    "llama.cpp": _llama_cpp,
}


def check(name: str, kv_cache: str | None = None) -> None:
    """RequestError for an unknown engine, or one without what is asked for."""
    if name not in ENGINES:
        raise RequestError(f"engine {name!r} is unknown; allowed: {', '.join(ENGINES)}")
    if kv_cache is not None and name != "fewbits":
        raise RequestError(f"engine {name} has no quantized KV cache; drop --kv-cache or give --engine fewbits")
    if name == "llama.cpp":
        llamacpp.library()


def load(path: str | Path, dtype: torch.dtype, engine: str = "fewbits") -> Loaded:
    """``(model, tokenizer)``. Raises RequestError for what the engine cannot run, CheckpointError for damaged files."""
    check(engine)
    return ENGINES[engine](path, dtype)


def _file(path: str | Path) -> gguf.File:
    file = loading.gguf_file(path)
    if file is None:
        raise RequestError(f"{path} is not a GGUF file, which this engine needs; give one, or --engine fewbits")
    return gguf.read(file)


class LlamaCppModule(nn.Module):
    """A GGUF file in llama.cpp that looks like a causal language model of transformers without a cache.

    llama.cpp gives finished logits, so the hidden states that enter the output embedding are those, and the output
    embedding is the identity.
    """

    def __init__(self, file: gguf.File):
        super().__init__()
        self.config = SimpleNamespace(**gguf_import.config_of(file), name_or_path=str(file.path))
        self.head: nn.Module = nn.Identity()
        self._engine = llamacpp.LlamaCpp(file.paths[0])

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.head = head

    def forward(self, input_ids: Tensor, **settings: Any) -> SimpleNamespace:
        """``input_ids [B, T]`` from their start -> ``logits`` float32 ``[B, T, V]``."""
        rows = [torch.cat(list(self._engine.logits(row))) for row in input_ids.tolist()]
        return SimpleNamespace(logits=self.head(torch.stack(rows)))
