"""Outliers among activations: how large the inputs of every linear layer get, and where the large values sit.

What LLM.int8() (Dettmers et al., 2022, section 4) found in large models: few channels hold nearly all values of
magnitude 6 and more, and hold them at most tokens. The walk has one block in memory at a time, with the inputs that
its linear layers get for the rows asked for, so memory grows with the text and not with the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.evaluate.base import OnEvent
from fewbits.model import Source, rows
from fewbits.pipeline.acts import Acts
from fewbits.pipeline.forward import run

THRESHOLD = 6.0  # LLM.int8()'s
_TOKENS = 512  # tokens whose float64 powers exist at once
_HEAVIEST = 5  # channels named per layer
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Outliers:
    """Values of magnitude ``threshold`` or more.

    ``share`` is of all values, ``channels`` and ``tokens`` count those that hold at least one. ``heaviest`` are
    (channel, its share of the outliers), ``first_token`` the outliers' share in the first tokens of rows: None
    without outliers, and where a layer sees chosen tokens only (an expert).
    """

    threshold: float
    count: int
    share: float
    channels: int
    tokens: int
    heaviest: tuple[tuple[int, float], ...]
    first_token: float | None


@dataclass(frozen=True)
class Inputs:
    """What enters ``layers`` (names on disk of the linear layers that read one input) of a block.

    ``sigma`` is the standard deviation over all values, ``kurtosis`` the fourth central moment over ``sigma**4``
    (3 for a normal distribution), ``channel_absmax`` float32 ``[channels]`` the largest magnitude of each channel.
    ``fixed`` are outliers above 6.0, ``relative`` those above a number of sigmas.
    """

    layers: tuple[str, ...]
    block: int
    tokens: int
    absmax: float
    absmean: float
    sigma: float
    kurtosis: float
    channel_absmax: Tensor
    fixed: Outliers
    relative: Outliers

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON types; of the channels' maxima, quantiles and the largest."""
        top = self.channel_absmax.topk(min(_HEAVIEST, len(self.channel_absmax)))
        q = torch.quantile(self.channel_absmax, torch.tensor(_QUANTILES))
        return {
            "layers": list(self.layers),
            "block": self.block,
            "tokens": self.tokens,
            "channels": len(self.channel_absmax),
            "absmax": self.absmax,
            "absmean": self.absmean,
            "sigma": self.sigma,
            "kurtosis": self.kurtosis,
            "channel_absmax": {f"p{100 * p:g}": v for p, v in zip(_QUANTILES, q.tolist(), strict=True)},
            "largest_channels": list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
            "fixed": asdict(self.fixed),
            "relative": asdict(self.relative),
        }


def study(
    path: str | Path,
    text: str | Path | None = None,
    samples: int = 16,
    seq_len: int = 512,
    sigmas: float = 6.0,
    on_event: OnEvent | None = None,
) -> list[Inputs]:
    """The inputs of every linear layer of a dense model, in the order of execution.

    ``text`` is a file or the name of a fetched text, by default ``c4``: ``samples`` rows of ``seq_len`` tokens.
    Raises RequestError for a model or a text that cannot be used, FewbitsError when activations are not finite.
    """
    source = Source.open(path)
    ids = rows(source.tokenizer(), text, samples, seq_len)
    acts = Acts(samples, seq_len, int(source.text_config.hidden_size))
    for b, part in acts.batches(ids):
        acts[b] = source.embed(part)
    found: list[Inputs] = []
    for i in range(source.n_blocks):
        found += _block(source, i, acts, sigmas)
        if on_event is not None:
            on_event({"event": "block", "block": i, "blocks": source.n_blocks})
    return found


@torch.no_grad()
def _block(source: Source, i: int, acts: Acts, sigmas: float) -> list[Inputs]:
    """One block's inputs; moves ``acts`` past it. Every batch waits at a layer until all have arrived there, so an
    input can be read twice: for its deviation, and for what exceeds a multiple of that.
    """
    block, kwargs = source.block(i), source.block_kwargs(acts.tokens)[i]
    stages = source.stages(block)
    waiting: list[Tensor] = []
    found: list[Inputs] = []

    def forward(b: int) -> Tensor:
        out = block(acts[b], **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def solve(stage: int) -> None:
        if waiting:
            names = tuple(source.disk_name(i, local) for local in stages[stage])
            found.append(describe(names, i, waiting, sigmas))
            waiting.clear()

    forwards = [lambda b=b: forward(b) for b in range(len(acts))]
    for b, out in run(block, stages, forwards, lambda stage, b, x: waiting.append(x), solve):
        acts[b] = out
    return found


def describe(layers: tuple[str, ...], block: int, batches: Sequence[Tensor], sigmas: float) -> Inputs:
    """Figures of one input, given as batches ``[rows, T, channels]`` or ``[tokens, channels]``."""
    channels = batches[0].shape[-1]
    powers, absolute, tokens = torch.zeros(5, dtype=torch.float64), 0.0, 0
    absmax = torch.zeros(channels)
    for x in batches:
        for part in x.flatten(0, -2).split(_TOKENS):
            if not bool(torch.isfinite(part).all()):
                bad = tokens + int((~torch.isfinite(part).all(1)).nonzero()[0])
                raise FewbitsError(f"what enters {layers[0]} is not finite at token {bad} of the text; check the model")
            powers += _powers(part)
            absolute += float(part.abs().sum(dtype=torch.float64))
            absmax = torch.maximum(absmax, part.abs().amax(0).float())
            tokens += len(part)
    count = tokens * channels
    sigma, kurtosis = _shape(powers / count)
    return Inputs(
        layers,
        block,
        tokens,
        float(absmax.max()),
        absolute / count,
        sigma,
        kurtosis,
        absmax,
        outliers(batches, THRESHOLD),
        outliers(batches, sigmas * sigma),
    )


def outliers(batches: Sequence[Tensor], threshold: float) -> Outliers:
    """Where values of magnitude ``threshold`` or more sit; batches as in :func:`describe`."""
    channels = batches[0].shape[-1]
    per_channel = torch.zeros(channels, dtype=torch.int64)
    tokens = values = first = 0
    for x in batches:
        large = x.abs() >= threshold
        per_channel += large.flatten(0, -2).sum(0)
        tokens += int(large.any(-1).sum())
        values += x.numel()
        first += int(large[:, 0].sum()) if x.ndim == 3 else 0
    count = int(per_channel.sum())
    top = per_channel.topk(min(_HEAVIEST, channels))
    heaviest = tuple((c, n / count) for c, n in zip(top.indices.tolist(), top.values.tolist(), strict=True) if n)
    known = count and all(x.ndim == 3 for x in batches)
    return Outliers(
        threshold,
        count,
        count / values,
        int((per_channel > 0).sum()),
        tokens,
        heaviest,
        first / count if known else None,
    )


def _powers(x: Tensor) -> Tensor:
    """Sums of the powers 0 to 4, float64 ``[5]``."""
    x = x.double()
    square = x * x
    sums = (x.sum(), square.sum(), (square * x).sum(), (square * square).sum())
    return torch.stack([torch.tensor(float(x.numel()), dtype=torch.float64), *sums])


def _shape(mean: Tensor) -> tuple[float, float]:
    """Standard deviation and kurtosis from the mean powers 0 to 4; a constant input has a kurtosis of NaN."""
    _, m, s2, s3, s4 = mean.tolist()
    variance = max(0.0, s2 - m * m)
    fourth = s4 - 4 * m * s3 + 6 * m * m * s2 - 3 * m**4
    return math.sqrt(variance), fourth / variance**2 if variance > 0 else math.nan
