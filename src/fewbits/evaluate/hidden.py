"""A model as two halves, body and head, so that two models can be compared without holding both.

The body turns token ids into the hidden states that enter the output embedding; the head turns a few hidden states into
logits. Logits of a whole window are never made: at a vocabulary of 150,000, one window of 2,048 tokens would be 1.2 GB.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import CheckpointError, FewbitsError, RequestError

_IN_MEMORY = 256 << 20  # bytes of hidden states above which they go to a memory-mapped file
STEP = 64  # tokens at a time through a quantized cache: what is older is read from it
_PROBE = 16  # tokens on which body and head are checked against the model itself


class Head:
    """Hidden states ``[n, d]`` -> logits float32 ``[n, V]``: the output embedding and what the config says comes after.

    ``dtype`` is that of the hidden states inside the model; :class:`Store` keeps them in float32, which holds all
    others.
    """

    def __init__(self, linear: nn.Module, config: Any, dtype: torch.dtype):
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.linear = linear
        self.scale = float(getattr(text, "logit_scale", None) or 1.0) / float(
            getattr(text, "logits_scaling", None) or 1.0
        )
        self.cap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
        self.dtype = dtype

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        out = self.linear(hidden.to(self.dtype)).float()
        out = out if self.scale == 1.0 else out * self.scale
        return out if self.cap == 0.0 else torch.tanh(out / self.cap) * self.cap


class _Record(nn.Module):
    """Stands where the output embedding was: keeps what enters, and hands on a vocabulary of one word."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None
        # Some models look at their output embedding's weight for its dtype or device.
        self.weight = nn.Parameter(torch.zeros(1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x[..., :1]


@torch.inference_mode()
def split(model: nn.Module, probe: Tensor) -> tuple[nn.Module, Head]:
    """Body and head of a causal language model; the body is ``model`` itself with its output embedding taken out.

    ``probe`` int64 ``[T]``: tokens on which ``head(body(probe))`` must equal the model's own logits, else
    RequestError (CheckpointError when those are not finite): a model whose logits are made in a way that this file
    does not know must not be scored wrongly.
    """
    config: Any = model.config
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if linear is None:
        raise RequestError(f"{type(model).__name__} has no output embedding; evaluation needs a causal language model")
    ids = probe[:_PROBE][None]
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    if not bool(torch.isfinite(own).all()):
        raise CheckpointError(f"the logits of {config.name_or_path} are not finite; the model is damaged")
    model.set_output_embeddings(_Record())  # type: ignore[operator]
    seen = states(model, ids)[0]
    head = Head(linear, config, seen.dtype)
    ours = head(seen)
    if ours.shape != own.shape or not torch.allclose(ours, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise RequestError(
            f"{type(model).__name__} computes its logits in a way that evaluation does not know (they differ by "
            f"{_gap(ours, own)}); evaluate it with its own software"
        )
    return model, head


def _gap(ours: Tensor, own: Tensor) -> str:
    if ours.shape != own.shape:
        return f"shape {tuple(ours.shape)} against {tuple(own.shape)}"
    return f"up to {float((ours - own).abs().max()):.3g}"


def cache_of(model: Any, asked: str | None) -> str | None:
    """The kind of cache that ``model`` reads its past from: what is ``asked`` for, or what its checkpoint states."""
    from fewbits.runtime.kvcache import chosen

    return chosen(getattr(model, "config", None), asked)


@torch.inference_mode()
def states(body: nn.Module, ids: Tensor, kv_cache: str | None = None) -> Tensor:
    """Hidden states ``[B, T, d]`` that enter the output embedding, for ids ``[B, T]``, in the model's dtype.

    With a quantized ``kv_cache`` tokens go through the model ``STEP`` at a time, so that each reads its past from the
    cache as it would while generating.
    """
    record: Any = body.get_output_embeddings()  # type: ignore[operator]
    if kv_cache is None:
        body(input_ids=ids, use_cache=False)
        seen, record.seen = record.seen, None
        return seen
    from fewbits.runtime.kvcache import QuantizedCache

    cache, found = QuantizedCache(body.config, kv_cache), []
    for some in ids.split(STEP, 1):
        body(input_ids=some, past_key_values=cache, use_cache=True)
        found.append(record.seen)
        record.seen = None
    return torch.cat(found, 1)


class Store:
    """Hidden states of all windows, float32 ``[windows, T, d]``, in memory or in a temporary memory-mapped file.

    Use it as a context manager; the file is gone when the block ends. Raises FewbitsError when the disk is full.
    """

    def __init__(self, windows: int, ctx: int, width: int):
        self.shape = (windows, ctx, width)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._data: Tensor | None = None

    def __enter__(self) -> Store:
        count = self.shape[0] * self.shape[1] * self.shape[2]
        if 4 * count <= _IN_MEMORY:
            self._data = torch.empty(self.shape)
            return self
        self._folder = tempfile.TemporaryDirectory(prefix="fewbits-eval-")
        file = Path(self._folder.name) / "hidden.f32"
        try:
            _reserve(file, 4 * count)
        except OSError as e:
            self.__exit__()
            raise FewbitsError(
                f"no room for {4 * count / 1e9:.1f} GB of hidden states in {tempfile.gettempdir()} ({e.strerror}); "
                "free space, set TMPDIR, or give fewer --windows"
            ) from None
        self._data = torch.from_file(str(file), shared=True, size=count, dtype=torch.float32).reshape(self.shape)
        return self

    def __exit__(self, *exc: object) -> None:
        self._data = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def put(self, first: int, hidden: Tensor) -> None:
        """Keep ``hidden [B, T, d]`` as windows ``first .. first + B``."""
        self._get()[first : first + len(hidden)] = hidden

    def __getitem__(self, window: int) -> Tensor:
        return self._get()[window]

    def _get(self) -> Tensor:
        if self._data is None:
            raise RuntimeError("the store is closed")
        return self._data


def _reserve(file: Path, size: int) -> None:
    """Really allocate the blocks: writing to a sparse map on a full disk would kill the process with SIGBUS."""
    with file.open("wb") as f:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, size)
        else:
            f.truncate(size)


def batches(ids: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """``(first window, ids [<= batch, T])`` in order."""
    for first in range(0, len(ids), batch):
        yield first, ids[first : first + batch]
