"""Who computes the predictions: our own forward pass, ours with llama.cpp's roundings, or llama.cpp itself.

An engine turns windows into what its head turns into logits: hidden states, or logits already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.evaluate import hidden as hiddens


@dataclass(frozen=True)
class How:
    """What all engines are told: tokens of a window, dtype of our own arithmetic, a quantized KV cache or None."""

    ctx: int
    dtype: torch.dtype
    kv_cache: str | None = None


class Ours:
    """transformers' modules and our own layers."""

    def __init__(self, path: str | Path, how: How):
        self.how = how
        self.model, self.tokenizer = self._load(path)
        if self.tokenizer is None:
            raise RequestError(f"{path} has no tokenizer; copy the tokenizer files of the original model into it")
        require_positions(path, getattr(self.model.config, "max_position_embeddings", None), how.ctx)
        self.body: Any = None
        self.head: Any = None

    def _load(self, path: str | Path) -> tuple[Any, Any]:
        from fewbits.runtime import load

        model, tokenizer = load(path, dtype=self.how.dtype)
        return model.eval(), tokenizer

    def prepare(self, probe: Tensor) -> None:
        """Split the model; ``probe`` int64 ``[T]`` are tokens to check that on."""
        self.body, self.head = hiddens.split(self.model, probe)

    def width(self, ids: Tensor) -> int:
        """Size of a hidden state."""
        return hiddens.states(self.body, ids[:1, :2]).shape[-1]

    def __call__(self, ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """For each window of ``ids [B, T]`` (row, first position, what the head takes ``[n, d]``), in order."""
        for row, h in enumerate(hiddens.states(self.body, ids, self.cache())):
            yield row, 0, h

    def cache(self) -> Callable[[Any], Any] | None:
        """What makes the key-value cache that tokens read their past from; None for none."""
        kind = self.how.kv_cache
        if kind is None:
            return None
        from fewbits.runtime.kvcache import QuantizedCache

        return lambda config: QuantizedCache(config, kind)

    def facts(self) -> dict[str, Any]:
        """Sizes of the quantized cache for the report."""
        if self.how.kv_cache is None:
            return {}
        from fewbits.runtime.kvcache import bytes_per_token

        config = self.model.config
        return {
            "kv_bytes_per_token": bytes_per_token(config, self.how.kv_cache),
            "kv_bytes_per_token_16bit": bytes_per_token(config, None),
        }

    def close(self) -> None:
        """Forget the model; the head stays as long as somebody holds it."""
        self.model = self.body = None


class Rounding(Ours):
    """Our forward pass of a GGUF file with the inputs of products, keys and values rounded as llama.cpp's CPU code does.

    What is left between this and llama.cpp is the order of sums.
    """

    def _load(self, path: str | Path) -> tuple[Any, Any]:
        from fewbits.formats import gguf
        from fewbits.runtime import ggml_inputs

        model, tokenizer = super()._load(path)
        ggml_inputs.install(model, gguf.read(gguf_of(path)))
        return model, tokenizer

    def cache(self) -> Callable[[Any], Any] | None:
        from fewbits.runtime.ggml_inputs import HalfCache

        return HalfCache


class LlamaCpp:
    """llama.cpp through an installed binding; the tokenizer is ours, so that windows are those of every engine."""

    def __init__(self, path: str | Path, how: How):
        from fewbits.formats import gguf, gguf_import
        from fewbits.runtime import llamacpp, loading

        llamacpp.library()
        file = gguf.read(gguf_of(path))
        require_positions(path, gguf_import.config_of(file)["max_position_embeddings"], how.ctx)
        self.tokenizer = loading.gguf_tokenizer(file)
        self.model = llamacpp.LlamaCpp(file.paths[0])

    def prepare(self, probe: Tensor) -> None:
        """Nothing to do."""

    @staticmethod
    def head(logits: Tensor) -> Tensor:
        """Logits come finished."""
        return logits

    def __call__(self, ids: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        for row, window in enumerate(ids.tolist()):
            start = 0
            for logits in self.model.logits(window):
                yield row, start, logits
                start += len(logits)

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.model.close()


ENGINES: dict[str, type[Ours] | type[LlamaCpp]] = {"fewbits": Ours, "fewbits-q8": Rounding, "llama.cpp": LlamaCpp}


def engine(name: str, kv_cache: str | None) -> type[Ours] | type[LlamaCpp]:
    """An engine by name. Raises RequestError for an unknown one, and for what llama.cpp's cannot do."""
    if name not in ENGINES:
        raise RequestError(f"engine {name!r} is unknown; allowed: {', '.join(ENGINES)}")
    if kv_cache is not None and name != "fewbits":
        raise RequestError(f"engine {name} has no quantized KV cache; drop --kv-cache or give --engine fewbits")
    return ENGINES[name]


def gguf_of(path: str | Path) -> Path:
    """The GGUF file that ``path`` means. Raises RequestError when it means something else."""
    from fewbits.runtime.loading import gguf_file

    file = gguf_file(path)
    if file is None:
        raise RequestError(f"{path} is not a GGUF file, which this engine needs; give one, or --engine fewbits")
    return file


def require_positions(path: str | Path, limit: int | None, ctx: int) -> None:
    """RequestError when the model has fewer positions than a window has tokens."""
    if limit is not None and ctx > limit:
        raise RequestError(f"--ctx {ctx} is more than the {limit} positions of {path}; give --ctx {limit} or less")
