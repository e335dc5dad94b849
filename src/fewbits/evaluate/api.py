"""``evaluate``: score a model on a text, window by window, against the model that it was made from."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.errors import CheckpointError, RequestError
from fewbits.evaluate import hidden as hiddens
from fewbits.evaluate import interval, score
from fewbits.evaluate import text as texts
from fewbits.evaluate.against import Reference, Settings
from fewbits.evaluate.base import Evaluation, OnEvent
from fewbits.evaluate.census import census
from fewbits.runtime import engines


def evaluate(
    path: str | Path,
    text: str | Path | None = None,
    ctx: int = 2048,
    windows: int = 20,
    reference: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
    kv_cache: str | None = None,
    on_event: OnEvent | None = None,
    engine: str = "fewbits",
) -> Evaluation:
    """Perplexity of the model at ``path`` and its KL divergence from ``reference`` on the first windows of ``text``.

    ``path`` and ``reference`` are dense or quantized checkpoints. ``text`` is a UTF-8 file or the name of a fetched
    text; None takes ``wikitext2``. ``dtype`` is what both models compute in, so that KL measures quantization and
    nothing else: None is float32 on a CPU. ``batch`` windows go through a model at once. The reference is run first;
    only its hidden states and its output embedding are kept while the second model runs. ``kv_cache`` ("int8", "int4",
    "int2", "fp8") makes the model at ``path``, not the reference, read its past from a quantized cache; None does so
    where its checkpoint says it, and "none" never. ``engine``
    computes the model at ``path``: "fewbits"; for a GGUF file also "llama.cpp", through an installed binding, and
    "fewbits-q8", our forward pass with the roundings of llama.cpp's CPU code.

    Raises RequestError for a missing or short text, a ``ctx`` beyond the model's positions, or tokenizers that differ;
    CheckpointError for damaged files.
    """
    started = time.perf_counter()
    engines.check(engine, None if kv_cache == "none" else kv_cache)
    settings = Settings(ctx, windows, max(1, batch), float_type(dtype), on_event or (lambda event: None))
    run = _Run(settings, _cache(kv_cache), engine)
    name = "wikitext2" if text is None else text
    content = texts.read(name)
    if reference is None:
        losses = run.alone(path, content)[None]
    else:
        losses = run.against(path, reference, content)
    facts = census(path) if Path(path).exists() else None
    return summary(
        losses,
        {
            "model": str(path),
            "reference": None if reference is None else str(reference),
            "engine": engine,
            "text": str(name),
            "ctx": ctx,
            "windows": windows,
            "seconds": time.perf_counter() - started,
            "size_bytes": facts and facts.size_bytes,
            "bits_per_weight": facts and facts.bits_per_weight,
        }
        | run.cache_facts,
    )


def _cache(kind: str | None) -> str | None:
    from fewbits.runtime.kvcache import OFF, scheme

    if kind is not None and kind != OFF:
        scheme(kind)
    return kind


class _Run:
    """One evaluation: the settings that both models share."""

    def __init__(self, settings: Settings, kv_cache: str | None, engine: str):
        self.settings, self.asked, self.engine = settings, kv_cache, engine
        self.kv_cache: str | None = None
        self.cache_facts: dict[str, Any] = {}

    def alone(self, path: str | Path, content: str) -> Tensor:
        """NLL, float64 ``[windows * (ctx - 1)]``."""
        s = self.settings
        model, tokenizer = s.load(path, self.engine)
        ids = texts.windows(tokenizer, content, s.ctx, s.windows)
        body, head = hiddens.split(model, ids[0])
        self._measure(model)
        found = []
        for _, some in s.walk(ids, "model"):
            for row, h in zip(some, hiddens.states(body, some, self.kv_cache), strict=True):
                found.append(score.losses(h[:-1], head, row[1:]))
        return torch.cat(found)

    def against(self, path: str | Path, reference: str | Path, content: str) -> Tensor:
        """float64 ``[4, windows * (ctx - 1)]``, as :func:`fewbits.evaluate.score.compare`."""
        with Reference(reference, {"text": content}, self.settings) as ref:
            return ref.compare(path, self.asked, self._measure, self.engine)["text"]

    def _measure(self, model: Any) -> None:
        """The cache of the model under test, and its sizes for the report."""
        from fewbits.runtime.kvcache import bytes_per_token

        self.kv_cache = hiddens.cache_of(model, self.asked)
        if self.kv_cache is not None:
            self.cache_facts = {
                "kv_cache": self.kv_cache,
                "kv_bytes_per_token": bytes_per_token(model.config, self.kv_cache),
                "kv_bytes_per_token_16bit": bytes_per_token(model.config, None),
            }


def float_type(dtype: torch.dtype | str | None) -> torch.dtype:
    """A floating-point type by name, float32 for None. Raises RequestError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype or "float32", None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RequestError(f"dtype {dtype!r} is not a floating-point type; give float32, bfloat16 or float16")
    return found


def summary(losses: Tensor, facts: dict[str, Any]) -> Evaluation:
    """Figures and their intervals. ``losses`` is ``[1, n]`` (NLL) or ``[4, n]`` (NLL of P, NLL of Q, KL, agreement)."""
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
