"""What an evaluation returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model Q on a text, and of its distance from a reference P when there is one.

    ``perplexity`` is ``exp`` of the mean negative log-likelihood in nats; ``kl_mean`` and ``kl_p99`` are KL(P||Q) in
    nats per token; ``top1`` is the share of positions where both models' likeliest token is the same. ``tokens``
    counts scored predictions. ``*_ci95`` are 95 % intervals of the block bootstrap in
    :mod:`fewbits.evaluate.interval`. What needs a reference is None without one. ``size_bytes`` is the whole
    checkpoint's tensors, ``bits_per_weight`` is over the quantized linear layers (over all linear layers of a dense
    model). ``model`` and ``reference`` are what was given, ``engine`` who computed the model. With a quantized
    ``kv_cache`` its size for one token in all layers, and that of a cache in 16 bits.
    """

    model: str
    reference: str | None
    text: str
    ctx: int
    windows: int
    tokens: int
    perplexity: float
    perplexity_ci95: Interval
    seconds: float
    size_bytes: int | None = None
    bits_per_weight: float | None = None
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_mean_ci95: Interval | None = None
    kl_p99: float | None = None
    kl_p99_ci95: Interval | None = None
    top1: float | None = None
    top1_ci95: Interval | None = None
    engine: str = "fewbits"
    kv_cache: str | None = None
    kv_bytes_per_token: float | None = None
    kv_bytes_per_token_16bit: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON types; intervals become lists of two numbers."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
