"""The plan of one run: sizes to the byte, memory and time of quantizing here, where the result fits, how fast it is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fewbits import formats
from fewbits.advise import run, sizes, walk
from fewbits.formats import pruned
from fewbits.formats.common import describe
from fewbits.pipeline.job import Job, peak_rss

TEXT = "bitsandbytes"
"""The format that writes numbers as text into tensors: with double quantization its sizes may differ by the digits."""


@dataclass(frozen=True)
class Target:
    """What the result is to run on: ``memory`` bytes of the device (None: do not ask), ``context`` tokens of each of
    ``batch`` sequences, ``bandwidth`` bytes per second (None: a table of well-known ones).
    """

    memory: int | None = None
    context: int = 4096
    batch: int = 1
    bandwidth: float | None = None


@dataclass(frozen=True)
class Forecast:
    """See the fields of :meth:`to_json`. ``seconds`` and ``peak_rss_bytes`` are None when they were not asked for."""

    method: str
    format: str
    components: dict[str, int]
    exact: bool
    parameters: int
    bits_per_weight: float
    grids: dict[str, tuple[int, int]]
    protected: tuple[str, ...]
    tied: tuple[str, ...]
    warnings: tuple[str, ...]
    target: Target
    kv_cache_bytes: int
    decode: dict[str, float]
    fit: run.Fit | None = None
    peak_rss_bytes: int | None = None
    phase: str | None = None
    seconds: float | None = None
    largest: float | None = field(default=None)

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sizes.total(self.components)

    def to_json(self) -> dict[str, Any]:
        """The keys of ``fewbits plan --json``."""
        weights = {g: {"tensors": n, "weights": w} for g, (n, w) in self.grids.items()}
        return {
            "method": self.method,
            "format": self.format,
            "size_bytes": self.size_bytes,
            "exact": self.exact,
            "components": self.components,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": 8 * self.size_bytes / self.parameters,
            "tensors": sum(n for n, _ in self.grids.values()),
            "grids": weights,
            "protected": list(self.protected),
            "tied": list(self.tied),
            "warnings": list(self.warnings),
            "context": self.target.context,
            "batch": self.target.batch,
            "kv_cache_bytes": self.kv_cache_bytes,
            "decode_tokens_per_s_at_most": self.decode,
            "fit": None if self.fit is None else self.fit.to_json() | {"largest_bits_per_weight": self.largest},
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_phase": self.phase,
            "seconds": self.seconds,
        }


def forecast(job: Job, target: Target | None = None, measure: bool = True) -> Forecast:
    """Plan a checked job. ``measure`` says whether time and memory are wanted, which takes a second or two of
    measuring the machine; weights are never read.
    """
    target = target or Target()
    source, plan = job.source, job.plan
    tensors = sizes.stored(job)
    components = sizes.by_component(tensors)
    entries = job.entries
    on_grid = [e for e in entries if e.grid is not None]
    linear = sum(math.prod(e.shape) for e in on_grid)
    grids: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for e in on_grid:
        name = describe(e.grid)
        grids[name] += 1
        weights[name] += math.prod(e.shape)
    bits = sum(math.prod(e.shape) * e.grid.cost(e.shape) + 32 * e.shape[1] * e.scattered for e in on_grid if e.grid)
    cache = run.kv_cache(source.config, target.context, target.batch, plan.kv_cache)
    read = run.read_per_step(tensors, source.tied, run.active_experts(source.config, target.batch))
    bandwidths = run.BANDWIDTHS if target.bandwidth is None else {"given": target.bandwidth}
    fit = None
    if target.memory is not None:
        fit = run.Fit(target.memory, sizes.total(components), cache, run.overhead(target.memory))
    packed = sum(t.nbytes for t in tensors if t.component in ("weights", "scales", "zeros", "codebooks", "indices"))
    largest = run.largest_bits(fit, linear, sizes.total(components) - packed) if fit and linear else None
    peak, phase, seconds = _cost(job) if measure else (None, None, None)
    return Forecast(
        method=plan.method,
        format=plan.format,
        components=components,
        exact=_exact(job),
        parameters=sum(math.prod(source.checkpoint.shape(n)) for n in source.checkpoint.names()),
        bits_per_weight=bits / linear if linear else 0.0,
        grids={g: (grids[g], weights[g]) for g in grids},
        protected=tuple(e.name for e in entries if e.grid is None),
        tied=(source.head_name,) if source.tied else (),
        warnings=tuple(formats.warnings(plan.format, entries)),
        target=target,
        kv_cache_bytes=cache,
        decode=run.decode_bounds(read, cache, target.batch, bandwidths),
        fit=fit,
        peak_rss_bytes=peak,
        phase=phase,
        seconds=seconds,
        largest=largest,
    )


def _exact(job: Job) -> bool:
    """Whether sizes follow from shapes: not of numbers written as text, what a split keeps, what pruning leaves."""
    recipes = [r for r in job.recipes.values() if r is not None]
    text = job.plan.format == TEXT and any(getattr(r.grid, "nested", False) for r in recipes)
    prunes = pruned.stored_by(job.layout) and any(getattr(r.solver, "wants_zero", False) for r in recipes)
    return not text and not prunes and not any(getattr(r, "split", None) for r in recipes)


def _cost(job: Job) -> tuple[int, str, float]:
    model = walk.Model(job, peak_rss())
    peak, phases = model.peak()
    return peak, phases[0].name, model.seconds()
