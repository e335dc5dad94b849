"""What running the result takes: KV cache, memory on a device, and how fast decoding can be at most.

``KV = 2 L n_kv d_h bytes T batch``; layers with a sliding window keep no more than that; multi-head latent attention
keeps ``kv_lora_rank + qk_rope_head_dim`` numbers per token and layer. Decoding reads every weight but the embedding
table once per step: at most ``batch * bandwidth / (weights + batch * KV)`` tokens per second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.advise.sizes import Stored
from fewbits.runtime.kvcache import bytes_per_token, scheme

GIB = 2**30
# What a device needs besides weights and cache (context, workspace, fragmentation), GiB of the device: GiB.
_OVERHEAD = ((0.0, 0.25), (8.0, 0.6), (24.0, 1.2), (48.0, 1.5), (80.0, 2.0), (200.0, 3.5))

# Bytes per second that memory gives at most (vendors' data sheets); the last two are typical desktops and laptops.
BANDWIDTHS: dict[str, float] = {
    "RTX 3090": 936e9,
    "RTX 4090": 1008e9,
    "A100": 2039e9,
    "H100": 3350e9,
    "CPU 80 GB/s": 80e9,
    "CPU 20 GB/s": 20e9,
}


def kv_cache(config: Any, tokens: int, batch: int = 1, kind: str | None = None) -> int:
    """Bytes of the KV cache of ``batch`` sequences of ``tokens`` tokens; ``kind`` as in ``--kv-cache``."""
    text = config.get_text_config()
    latent = getattr(text, "kv_lora_rank", None)
    if latent:
        return int(text.num_hidden_layers * (latent + text.qk_rope_head_dim) * 2 * tokens * batch)
    layers = text.num_hidden_layers
    plain = bytes_per_token(config, None) / layers
    packed, newest = (plain, 0) if kind is None else (bytes_per_token(config, kind) / layers, scheme(kind).window)
    total = 0.0
    for window in _windows(text, layers):
        seen = tokens if window is None else min(tokens, window)
        recent = min(seen, newest)
        total += recent * plain + (seen - recent) * packed
    return int(total * batch)


def _windows(text: Any, layers: int) -> list[int | None]:
    """The sliding window of each layer, None where it sees everything."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not window or getattr(text, "use_sliding_window", True) is False:
        return [None] * layers
    if kinds:
        return [window if "sliding" in k else None for k in kinds]
    return [window] * layers


def overhead(capacity: int) -> int:
    """Bytes that a device of ``capacity`` bytes needs besides weights and cache: between the points of a table."""
    size = capacity / GIB
    for (x0, y0), (x1, y1) in itertools.pairwise(_OVERHEAD):
        if size <= x1:
            return int((y0 + (y1 - y0) * (size - x0) / (x1 - x0)) * GIB)
    return int(_OVERHEAD[-1][1] * GIB)


@dataclass(frozen=True)
class Fit:
    """Whether a model fits a device. Bytes; ``spare`` is negative when it does not."""

    capacity: int
    weights: int
    kv_cache: int
    overhead: int

    @property
    def needed(self) -> int:
        return self.weights + self.kv_cache + self.overhead

    @property
    def spare(self) -> int:
        return self.capacity - self.needed

    def to_json(self) -> dict[str, Any]:
        found = {"capacity_bytes": self.capacity, "needed_bytes": self.needed, "spare_bytes": self.spare}
        return found | {"overhead_bytes": self.overhead, "fits": self.spare >= 0}


def largest_bits(fit: Fit, linear: int, outside: int) -> float:
    """The most bits per weight at which ``linear`` weights fit, beside ``outside`` bytes that stay as they are."""
    return 8 * (fit.capacity - fit.overhead - fit.kv_cache - outside) / linear


def read_per_step(tensors: Iterable[Stored], tied: bool, active: float = 1.0) -> int:
    """Bytes of weights that one decoding step reads: the embedding table only where it is the head too, and
    ``active`` of the routed experts.
    """
    left_out = () if tied else ("embeddings",)
    return int(sum(t.nbytes * (active if t.expert else 1) for t in tensors if t.component not in left_out))


def active_experts(config: Any, batch: int) -> float:
    """The share of the routed experts that a step of ``batch`` tokens needs, if tokens choose independently."""
    text = config.get_text_config()
    count = next((n for k in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, k, 0))), 0)
    chosen = getattr(text, "num_experts_per_tok", 0) or 0
    return float(1 - (1 - chosen / count) ** batch) if count and chosen else 1.0


def decode_bounds(read: int, cache: int, batch: int, bandwidths: Mapping[str, float] = BANDWIDTHS) -> dict[str, float]:
    """Tokens per second at most, of all sequences together. ``cache`` holds all of them."""
    return {name: batch * bandwidth / (read + cache) for name, bandwidth in bandwidths.items()}
