"""An importance matrix of a dense model: mean squares of the inputs of every linear layer, as llama-imatrix takes them.

The original model sees the text, one block in memory at a time; nothing is quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, RequestError
from fewbits.formats import gguf_names
from fewbits.formats.gguf_imatrix import Imatrix
from fewbits.model import Source, rows
from fewbits.pipeline.acts import Acts
from fewbits.pipeline.forward import run


@torch.no_grad()
def observe(
    path: str | Path,
    text: str | Path = "c4",
    samples: int = 128,
    seq_len: int = 512,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Imatrix:
    """The matrix of the model at ``path`` on ``samples`` rows of ``seq_len`` tokens of ``text`` (a file, or a name).

    Raises RequestError for a model that GGUF cannot express or a text that is too short, FewbitsError when activations
    are not finite.
    """
    source = Source.open(path)
    family = gguf_names.family(source.text_config.model_type)
    ids = rows(source.tokenizer(), text, samples, seq_len)
    acts = Acts(samples, seq_len, int(source.text_config.hidden_size))
    for b, part in acts.batches(ids):
        acts[b] = source.embed(part)
    sums: dict[str, Tensor] = {}
    for i in range(source.n_blocks):
        for local, squares in _block(source, i, acts).items():
            given = f"{source.disk_name(i, local)}.weight"
            if gguf_names.expert(given) is not None:
                raise RequestError(f"{path} has experts; importance matrices of dense models can be made")
            name = gguf_names.stored_name(given, family)
            if name is not None:
                sums[name] = squares
        if on_event is not None:
            on_event({"event": "block", "block": i, "blocks": source.n_blocks})
    counts = dict.fromkeys(sums, float(samples * seq_len))
    return Imatrix(sums, counts, str(text), samples, seq_len)


def _block(source: Source, i: int, acts: Acts) -> dict[str, Tensor]:
    """Sums of squares float32 ``[in]`` by local name; moves ``acts`` past the block."""
    block, kwargs = source.block(i), source.block_kwargs(acts.tokens)[i]
    stages = source.stages(block)
    found: dict[str, Tensor] = {}

    def forward(b: int) -> Tensor:
        out = block(acts[b], **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def observe(stage: int, batch: int, x: Tensor) -> None:
        squares = x.double().square().reshape(-1, x.shape[-1]).sum(0)
        if not bool(torch.isfinite(squares).all()):
            raise FewbitsError(f"activations are not finite in block {i}; check the model")
        for local in stages[stage]:
            found[local] = found.get(local, 0) + squares

    forwards = [lambda b=b: forward(b) for b in range(len(acts))]
    for b, out in run(block, stages, forwards, observe, lambda stage: None):
        acts[b] = out
    return {local: s.float() for local, s in found.items()}
