"""How long a model takes to load, to read a prompt and to write tokens on this machine, and how much memory it holds.

Each model is measured in a process of its own (:mod:`fewbits.evaluate.fresh`). Every figure is a median after a warm-up
that does not count. At batch 1 tokens are decoded as ``fewbits generate`` does; larger batches go through
transformers' own forward pass with its cache. Decoding never stops at an end-of-text token: prompts are random tokens,
which cost what any other tokens cost.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.evaluate.census import census
from fewbits.evaluate.fresh import fresh

BATCHES = (1, 4, 8)
PROMPT, TOKENS, REPEATS = 128, 32, 3
Clock = Callable[[], float]


def bench(
    path: str | Path,
    batches: Sequence[int] = BATCHES,
    prompt: int = PROMPT,
    tokens: int = TOKENS,
    repeats: int = REPEATS,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Figures of the checkpoint at ``path``, dense or quantized, as JSON types.

    ``load_seconds``; ``memory_bytes``, what the process grew by from before loading until after the first prompt;
    ``peak_rss_bytes``, the largest resident size of the process, interpreter and libraries included; for each of
    ``batches`` the ``prompt_tokens_per_s`` of ``prompt`` tokens per sequence and the ``decode_tokens_per_s`` of
    ``tokens`` more, both over all sequences, medians of ``repeats``. The same two keys at the top are of the first
    batch size. ``dtype`` is that of dense tensors and activations, by default the checkpoint's.

    Raises RequestError for sizes that are none or beyond the model's positions, CheckpointError for damaged files.
    """
    wrong = [(k, v) for k, v in (("prompt", prompt), ("repeats", repeats)) if v < 1] + [
        ("batch", b) for b in batches if b < 1
    ]
    if wrong:
        raise RequestError(f"--{wrong[0][0]} {wrong[0][1]} measures nothing; give 1 or more")
    if tokens < 2 or not batches:
        raise RequestError(f"--tokens {tokens} at batch sizes {list(batches)} times no step; give 2 tokens, one batch")
    how = {"batches": list(batches), "prompt": prompt, "tokens": tokens, "repeats": repeats, "dtype": dtype}
    found: dict[str, Any] = fresh("fewbits.evaluate.speed:measure", path=str(path), **how)
    facts = census(path) if Path(path).exists() else None
    return found | {
        "size_bytes": facts and facts.size_bytes,
        "bits_per_weight": facts and facts.bits_per_weight,
        "format": facts and facts.format,
    }


def measure(
    path: str, batches: Sequence[int], prompt: int, tokens: int, repeats: int, dtype: str | None
) -> dict[str, Any]:
    """:func:`bench` inside this process, whose earlier memory counts."""
    from fewbits.runtime import load

    before = resident()
    started = time.perf_counter()
    model, _ = load(path, dtype=dtype)
    loaded = time.perf_counter() - started
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt + tokens > limit:
        raise RequestError(
            f"--prompt {prompt} and --tokens {tokens} are more than the {limit} positions of {path}; give fewer"
        )
    model.generation_config.eos_token_id = None
    reader = Reader(model)
    reader.warm(batches[0], prompt)
    gc.collect()
    held = resident() - before
    rates = [reader.rate(b, prompt, tokens, repeats) for b in batches]
    return {
        "model": path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompt": prompt,
        "tokens": tokens,
        "load_seconds": loaded,
        "memory_bytes": max(0, held),
        "peak_rss_bytes": peak(),
        "prompt_tokens_per_s": rates[0]["prompt_tokens_per_s"],
        "decode_tokens_per_s": rates[0]["decode_tokens_per_s"],
        "batches": rates,
    }


class Reader:
    """A loaded model with a clock. ``clock`` returns seconds."""

    def __init__(self, model: Any, clock: Clock = time.perf_counter):
        self.model, self.clock = model, clock
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.last: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
        self._decoder: Any = None

    def warm(self, batch: int, prompt: int) -> None:
        """Pages read, caches filled, kernels chosen."""
        self.steps(self.ids(batch, prompt), 3)

    def rate(self, batch: int, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
        """Medians at one batch size; ``*_spread`` is (slowest - fastest) / median of the rounds."""
        ids = self.ids(batch, prompt)
        self.steps(ids, 3)
        rounds = [self.steps(ids, tokens) for _ in range(repeats)]
        read, write = [r for r, _ in rounds], [statistics.median(s) for _, s in rounds]
        found: dict[str, Any] = {"batch": batch}
        for name, seconds, count in (("prompt", read, batch * prompt), ("decode", write, batch)):
            middle = statistics.median(seconds)
            found[f"{name}_tokens_per_s"] = count / middle
            found[f"{name}_spread"] = (max(seconds) - min(seconds)) / middle
        return found

    def ids(self, batch: int, length: int) -> Tensor:
        """The same random tokens each time, int64 ``[batch, length]``."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(int(self.model.config.get_text_config().vocab_size), (batch, length), generator=generator)

    def steps(self, ids: Tensor, tokens: int) -> tuple[float, list[float]]:
        """Seconds for the prompt with its first new token, and for each of the ``tokens - 1`` after it."""
        times = [self.clock()]
        for _ in self._tokens(ids, tokens):
            times.append(self.clock())
        spans = [b - a for a, b in pairwise(times)]
        return spans[0], spans[1:]

    def _tokens(self, ids: Tensor, tokens: int) -> Any:
        from fewbits.runtime.decode import Decoder, supports

        if len(ids) > 1 or not supports(self.model, ids.shape[1] + tokens):
            return self._plain(ids, tokens)
        self._decoder = self._decoder or Decoder(self.model)
        return self._decoder.tokens(ids, tokens)

    def _plain(self, ids: Tensor, tokens: int) -> Any:
        with torch.inference_mode():
            out = self.model(input_ids=ids, use_cache=True, **self.last)
            new = out.logits[:, -1:].argmax(-1)
            yield new
            for _ in range(tokens - 1):
                out = self.model(input_ids=new, past_key_values=out.past_key_values, use_cache=True)
                new = out.logits[:, -1:].argmax(-1)
                yield new


def resident() -> int:
    """Resident size of this process now, bytes; its peak where the system does not say."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """Largest resident size of this process so far, bytes.

    The system's own count (``ru_maxrss``) would begin with what the process that started this one held.
    """
    from fewbits.pipeline.job import peak_rss

    return _status("VmHWM") or peak_rss()


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)
