"""``evaluate``: score a model on a text, window by window, against the model that it was made from."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import CheckpointError, RequestError
from fewbits.evaluate import engines, interval, score
from fewbits.evaluate import hidden as hiddens
from fewbits.evaluate import text as texts
from fewbits.evaluate.base import Evaluation, OnEvent
from fewbits.evaluate.census import census
from fewbits.evaluate.engines import How, LlamaCpp, Ours

_SAMPLE = 20_000  # characters on which two tokenizers must agree


def evaluate(
    path: str | Path,
    text: str | Path | None = None,
    ctx: int = 2048,
    windows: int = 20,
    reference: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
    kv_cache: str | None = None,
    engine: str = "fewbits",
    on_event: OnEvent | None = None,
) -> Evaluation:
    """Perplexity of the model at ``path`` and its KL divergence from ``reference`` on the first windows of ``text``.

    ``path`` and ``reference`` are dense or quantized checkpoints. ``text`` is a UTF-8 file or the name of a fetched
    text; None takes ``wikitext2``. ``dtype`` is what both models compute in, so that KL measures quantization and
    nothing else: None is float32 on a CPU. ``batch`` windows go through a model at once. The reference is run first;
    only its hidden states and its output embedding are kept while the second model runs. ``kv_cache`` ("int8", "int4",
    "int2", "fp8") makes the model at ``path``, not the reference, read its past from a quantized cache. ``engine`` computes
    the model at ``path``: "fewbits"; for a GGUF file also "llama.cpp", through an installed binding, and "fewbits-q8", our
    forward pass with the roundings of llama.cpp's CPU code.

    Raises RequestError for a missing or short text, a ``ctx`` beyond the model's positions, or tokenizers that differ;
    CheckpointError for damaged files.
    """
    started = time.perf_counter()
    how = How(ctx, _dtype(dtype), _cache(kv_cache))
    run = _Run(how, windows, max(1, batch), on_event or (lambda event: None), engine)
    name = "wikitext2" if text is None else text
    content = texts.read(name)
    if reference is None:
        losses = run.alone(path, content)[None]
    else:
        losses = run.against(path, reference, content)
    facts = census(path) if Path(path).exists() else None
    return _summary(
        losses,
        {
            "model": str(path),
            "reference": None if reference is None else str(reference),
            "text": str(name),
            "ctx": ctx,
            "windows": windows,
            "seconds": time.perf_counter() - started,
            "size_bytes": facts and facts.size_bytes,
            "bits_per_weight": facts and facts.bits_per_weight,
        }
        | run.facts,
    )


def _cache(kind: str | None) -> str | None:
    if kind is not None:
        from fewbits.runtime.kvcache import scheme

        scheme(kind)
    return kind


class _Run:
    """One evaluation: the settings that both models share."""

    def __init__(self, how: How, windows: int, batch: int, tell: OnEvent, engine: str):
        self.how, self.windows, self.batch, self.tell = how, windows, batch, tell
        self.engine = engines.engine(engine, how.kv_cache)
        self.facts: dict[str, Any] = {"kv_cache": how.kv_cache, "engine": engine}

    def alone(self, path: str | Path, content: str) -> Tensor:
        """NLL, float64 ``[windows * (ctx - 1)]``."""
        with closing(self.engine(path, self.how)) as q:
            ids = texts.windows(q.tokenizer, content, self.how.ctx, self.windows)
            return torch.cat([score.losses(h, q.head, targets) for _, h, targets in self._pieces(q, ids)])

    def against(self, path: str | Path, reference: str | Path, content: str) -> Tensor:
        """float64 ``[4, windows * (ctx - 1)]``, as :func:`fewbits.evaluate.score.compare`."""
        with closing(engines.Ours(reference, replace(self.how, kv_cache=None))) as p:
            ids = texts.windows(p.tokenizer, content, self.how.ctx, self.windows)
            p.prepare(ids[0])
            with hiddens.Store(self.windows, self.how.ctx, p.width(ids)) as kept:
                for first, some in self._walk(ids, "reference"):
                    for row, _, h in p(some):
                        kept.put(first + row, h[None])
                sample = texts.encode(p.tokenizer, content[:_SAMPLE])
                p.close()
                gc.collect()
                return self._second(path, kept, p.head, ids, (content, sample))

    def _second(
        self, path: str | Path, kept: hiddens.Store, head_p: hiddens.Head, ids: Tensor, agreed: tuple[str, Tensor]
    ) -> Tensor:
        with closing(self.engine(path, self.how)) as q:
            content, sample = agreed
            if not torch.equal(texts.encode(q.tokenizer, content[:_SAMPLE]), sample):
                raise RequestError(
                    f"{path} and its reference tokenize the text differently; give the model that it was made from"
                )
            found = []
            for (window, a), h, targets in self._pieces(q, ids):
                found.append(score.compare((kept[window][a : a + len(h)], head_p), (h, q.head), targets))
            return torch.cat(found, 1)

    def _pieces(self, q: Ours | LlamaCpp, ids: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        """((window, first position), what the head of ``q`` takes ``[n, d]``, targets ``[n]``) of all predictions."""
        q.prepare(ids[0])
        self.facts |= q.facts()
        for first, some in self._walk(ids, "model"):
            for row, a, h in q(some):
                targets = some[row, a + 1 : a + 1 + len(h)]
                if len(targets):
                    yield (first + row, a), h[: len(targets)], targets

    def _walk(self, ids: Tensor, which: str) -> Iterator[tuple[int, Tensor]]:
        for first, some in hiddens.batches(ids, self.batch):
            yield first, some
            done = first + len(some)
            self.tell({"event": "window", "which": which, "window": done, "windows": self.windows})


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype or "float32", None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RequestError(f"dtype {dtype!r} is not a floating-point type; give float32, bfloat16 or float16")
    return found


def _summary(losses: Tensor, facts: dict[str, Any]) -> Evaluation:
    """``losses`` is ``[1, n]`` (NLL) or ``[4, n]`` (NLL of P, NLL of Q, KL, agreement)."""
    per = losses.numpy()
    if not np.isfinite(per).all():
        raise CheckpointError(f"the logits of {facts['model']} or its reference are not finite; the model is damaged")
    nll = per[0] if len(per) == 1 else per[1]
    block = interval.blocks(facts["windows"], facts["ctx"] - 1)
    low, high = interval.mean_interval(nll, block)
    own = {
        "tokens": nll.size,
        "perplexity": _exp(float(nll.mean())),
        "perplexity_ci95": (_exp(low), _exp(high)),
    }
    if len(per) == 1:
        return Evaluation(**facts, **own)
    _, _, kl, same = per
    return Evaluation(
        **facts,
        **own,
        reference_perplexity=_exp(float(per[0].mean())),
        kl_mean=float(kl.mean()),
        kl_mean_ci95=interval.mean_interval(kl, block),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_p99_ci95=interval.quantile_interval(kl, block, 0.99),
        top1=float(same.mean()),
        top1_ci95=interval.mean_interval(same, block),
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
