"""How the weights of a dense model and the inputs of its linear layers are distributed; which channels stick out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.evaluate.base import OnEvent
from fewbits.model import Source, get_weight, rows
from fewbits.pipeline.acts import Acts
from fewbits.pipeline.forward import run

EDGES = torch.linspace(-12.0, 12.0, 97)
"""Edges of the histograms, in standard deviations; what lies outside joins the last bins."""


@torch.no_grad()
def study(
    path: str | Path,
    text: str | Path | None = None,
    samples: int = 2,
    seq_len: int = 512,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Histograms of values over their standard deviation (of one tensor), summed over the blocks by projection.

    As JSON types: ``edges``; ``weights`` and ``inputs``, counts by projection (inputs by the first one that reads
    them); ``channels``, the channel with the largest magnitude for each block and input, that magnitude and how many
    standard deviations it is; ``tokens`` looked at, of ``text`` as in :func:`fewbits.quantize`.
    """
    source = Source.open(path)
    ids = rows(source.tokenizer(), text, samples, seq_len)
    acts = Acts(samples, seq_len, int(source.text_config.hidden_size))
    for b, part in acts.batches(ids):
        acts[b] = source.embed(part)
    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    channels: list[dict[str, Any]] = []
    for i in range(source.n_blocks):
        block, kwargs = source.block(i), source.block_kwargs(seq_len)[i]
        stages = source.stages(block)
        for name, module in source.linears(block).items():
            _add(weights, kind(name), get_weight(module))
        waiting: list[Tensor] = []

        def forward(b: int, block: Any = block, kwargs: Any = kwargs) -> Tensor:
            out = block(acts[b], **kwargs)
            return out[0] if isinstance(out, tuple) else out

        def read(stage: int, i: int = i, stages: Any = stages, waiting: list[Tensor] = waiting) -> None:
            if waiting:
                x = torch.cat([t.reshape(-1, t.shape[-1]) for t in waiting])
                waiting.clear()
                name = ", ".join(dict.fromkeys(kind(n) for n in stages[stage]))
                channels.append({"block": i, "kind": name} | _add(inputs, name, x))

        def wait(stage: int, batch: int, x: Tensor, waiting: list[Tensor] = waiting) -> None:
            waiting.append(x)

        forwards = [lambda b=b: forward(b) for b in range(len(acts))]
        for b, out in run(block, stages, forwards, wait, read):
            acts[b] = out
        if on_event is not None:
            on_event({"event": "block", "block": i, "blocks": source.n_blocks, "which": "distribution"})
    return {
        "edges": EDGES.tolist(),
        "weights": {k: v.tolist() for k, v in weights.items()},
        "inputs": {k: v.tolist() for k, v in inputs.items()},
        "channels": channels,
        "tokens": samples * seq_len,
    }


def kind(name: str) -> str:
    """What a linear layer is called whatever its block or expert: ``q``, ``down``, ``experts up``."""
    last = name.rpartition(".")[2].removesuffix("_proj")
    return f"experts {last}" if "expert" in name else last


def _add(found: dict[str, Tensor], name: str, x: Tensor) -> dict[str, Any]:
    """Add ``x [n, channels]`` to the histogram ``name``; its largest channel."""
    x = x.float()
    sigma = float(x.std()) or 1.0
    inside = (x / sigma).clamp(float(EDGES[0]), float(EDGES[-1]))
    counts = torch.histc(inside, len(EDGES) - 1, float(EDGES[0]), float(EDGES[-1])).to(torch.int64)
    found[name] = counts + found.get(name, 0)
    peak, channel = x.abs().amax(0).max(0)
    return {"channel": int(channel), "absmax": float(peak), "sigmas": float(peak) / sigma}
