"""A key-value cache of few bits, as a Cache class of transformers (KIVI, arXiv 2402.02750, section 3).

Keys have outlier channels and values have none: keys share a scale along ``group`` tokens of one channel, values along
``group`` channels of one token. The newest tokens stay as they are: at least ``window`` of them, and those that do not
yet fill a group. Integers are affine, ``low + scale * code``, with ``low`` and ``scale`` in float16; FP8 is E4M3 with a
float16 scale for each token and head. What attention reads is always what is stored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from fewbits import formats
from fewbits.errors import RequestError

log = logging.getLogger("fewbits")


@dataclass(frozen=True)
class Scheme:
    """``bits`` of a code, or E4M3; ``group`` numbers share a scale; ``window`` newest tokens are not quantized."""

    bits: int
    float8: bool = False
    group: int = 32
    window: int = 32


SCHEMES = {"int8": Scheme(8, group=64), "int4": Scheme(4), "int2": Scheme(2), "fp8": Scheme(8, True, 1)}


OFF = "none"
"""What asks for a cache that is not quantized, whatever the checkpoint says."""


def scheme(name: str) -> Scheme:
    """A scheme by name. Raises RequestError with the allowed names."""
    if name not in SCHEMES:
        raise RequestError(f"KV cache {name!r} is unknown; allowed: {', '.join(SCHEMES)}")
    return SCHEMES[name]


@dataclass(frozen=True)
class Stored:
    """Quantized numbers whose last axis but one are tokens. ``codes`` uint8, packed along the last axis (or E4M3);
    ``scale`` and ``low`` float16, ``low`` None for E4M3. ``axis``: "tokens" or "channels" share a scale by groups.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor | None
    axis: str
    bits: int
    group: int

    @classmethod
    def of(cls, x: Tensor, s: Scheme, axis: str) -> Stored:
        """Quantize ``x [batch, heads, tokens, size]``; with axis "tokens" their number is a multiple of the group."""
        if s.float8:
            scale = (x.abs().amax(-1, keepdim=True).float() / 448).half()
            scale = torch.where(scale > 0, scale, 1.0)
            codes = (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            return cls(codes, scale, None, "channels", 8, x.shape[-1])
        group = s.group if axis == "tokens" or x.shape[-1] % s.group == 0 else x.shape[-1]
        parts, dim = _grouped(x.float(), axis, group)
        low, high = parts.amin(dim, keepdim=True).half(), parts.amax(dim, keepdim=True).half()
        scale = ((high.float() - low.float()) / (2**s.bits - 1)).half()
        scale = torch.where(scale > 0, scale, 1.0)
        codes = ((parts - low.float()) / scale.float()).round().clamp(0, 2**s.bits - 1).to(torch.uint8)
        return cls(_pack(codes.reshape(x.shape), s.bits), scale.squeeze(dim), low.squeeze(dim), axis, s.bits, group)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, ``[batch, heads, tokens, size]``."""
        if self.low is None:
            return (self.codes.float() * self.scale.float()).to(dtype)
        codes = _unpack(self.codes, self.bits)
        parts, dim = _grouped(codes.float(), self.axis, self.group)
        found = parts * self.scale.unsqueeze(dim).float() + self.low.unsqueeze(dim).float()
        return found.reshape(codes.shape).to(dtype)

    def followed_by(self, other: Stored) -> Stored:
        """Both, one after the other in time."""
        return self._each(lambda a, b: torch.cat([a, b], 2), other)

    def batch(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """The same with ``change`` applied to the first axis of every tensor."""
        return self._each(lambda a, _: change(a), self)

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        held = (self.codes, self.scale) if self.low is None else (self.codes, self.scale, self.low)
        return sum(t.numel() * t.element_size() for t in held)

    def _each(self, f: Callable[[Tensor, Tensor], Tensor], other: Stored) -> Stored:
        low = None if self.low is None or other.low is None else f(self.low, other.low)
        codes = f(self.codes.view(torch.uint8), other.codes.view(torch.uint8)).view(self.codes.dtype)
        return Stored(codes, f(self.scale, other.scale), low, self.axis, self.bits, self.group)


def chosen(config: Any, asked: str | None) -> str | None:
    """The kind of cache for a model of ``config``: what is ``asked`` for, else what its checkpoint says. "none" asks
    for transformers' own, which None stands for. Raises CheckpointError where the checkpoint states an unknown kind.
    """
    if asked is not None:
        return None if asked == OFF else asked
    described: Any = getattr(config, "quantization_config", None)
    raw = getattr(described, "raw", None) or (described.to_dict() if hasattr(described, "to_dict") else described)
    kind = formats.cache_kind(raw) if isinstance(raw, Mapping) else None
    if kind is not None:
        log.info("KV cache %s, as the checkpoint says", kind)
    return kind


class QuantizedLayer(DynamicLayer):
    """One layer's cache: old tokens quantized, new ones (``keys``, ``values``) as they came."""

    def __init__(self, scheme: Scheme):
        super().__init__()
        self.scheme = scheme
        self.old: tuple[Stored, Stored] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, quantize what has left the window, and return everything as attention reads it."""
        super().update(key_states, value_states)
        assert self.keys is not None and self.values is not None
        group = self.scheme.group
        leaving = max(0, self.keys.shape[-2] - self.scheme.window) // group * group
        if leaving:
            pair = (
                Stored.of(self.keys[:, :, :leaving], self.scheme, "tokens"),
                Stored.of(self.values[:, :, :leaving], self.scheme, "channels"),
            )
            old = self.old
            self.old = pair if old is None else (old[0].followed_by(pair[0]), old[1].followed_by(pair[1]))
            self.keys = self.keys[:, :, leaving:].contiguous()
            self.values = self.values[:, :, leaving:].contiguous()
        if self.old is None:
            return self.keys, self.values
        keys, values = (old.dense(self.keys.dtype) for old in self.old)
        return torch.cat([keys, self.keys], 2), torch.cat([values, self.values], 2)

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return super().get_seq_length() + (0 if self.old is None else self.old[0].tokens)

    def reset(self) -> None:
        self.old = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Tokens of the window can be taken back; quantized ones cannot. Raises RequestError."""
        held = 0 if self.keys is None else self.keys.shape[-2]
        if abs(tokens_to_remove) > held:
            raise RequestError(f"{abs(tokens_to_remove)} tokens cannot be taken back: the newest {held} can")
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._batch(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._batch(lambda t: t[indices])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        new = sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)
        return new + (0 if self.old is None else sum(s.nbytes for s in self.old))

    def _batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.old is not None:
            self.old = self.old[0].batch(change), self.old[1].batch(change)


class QuantizedCache(DynamicCache):
    """A cache for a model of ``config`` in scheme ``kind`` (see :data:`SCHEMES`), to be given as ``past_key_values``.

    Layers that attend through a sliding window or without keys keep transformers' own cache, which is bounded; a log
    line says so. Raises RequestError for an unknown kind.
    """

    def __init__(self, config: Any, kind: str = "int8"):
        super().__init__(config=config)
        chosen = scheme(kind)
        self.kind = kind
        self.layers = [QuantizedLayer(chosen) if type(layer) is DynamicLayer else layer for layer in self.layers]
        dense = sum(not isinstance(layer, QuantizedLayer) for layer in self.layers)
        if dense:
            log.warning("KV cache %s: %d of %d layers have a bounded cache, not quantized", kind, dense, len(self))

    @property
    def nbytes(self) -> int:
        """Bytes held by the quantized layers."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedLayer))


def bytes_per_token(config: Any, kind: str | None) -> float:
    """Bytes that one old token takes in all layers; ``kind`` None is a cache of 16-bit numbers."""
    text = config.get_text_config()
    queries = text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    bits = 16.0
    if kind is not None:
        s = scheme(kind)
        across = s.group if size % s.group == 0 else size
        shared = 16 / size if s.float8 else (32 / s.group + 32 / across) / 2
        bits = s.bits + shared
    return float(text.num_hidden_layers * 2 * heads * size * bits / 8)


def _grouped(x: Tensor, axis: str, group: int) -> tuple[Tensor, int]:
    """``x`` with its groups on an axis of their own, and that axis."""
    b, h, t, d = x.shape
    return (x.view(b, h, t // group, group, d), 3) if axis == "tokens" else (x.view(b, h, t, d // group, group), 4)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """``8 / bits`` codes to a byte along the last axis, the first in the lowest bits; a short byte is filled up."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)) if each > 1 else codes
    parts = codes.unflatten(-1, (-1, each))
    shifts = torch.arange(each, dtype=torch.uint8, device=codes.device) * bits
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    each = 8 // bits
    shifts = torch.arange(each, dtype=torch.uint8, device=packed.device) * bits
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
