"""Checkpoint formats: how a quantized model lies on disk, each read and written by one file.

To write: ``layout = writer("gptq", entries)``, then ``layout.pack`` for every module, ``layout.config(entries)`` and
``layout.files(entries)``. To read: ``layout = detect(quantization_config)``, then ``layout.unpack`` for every module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fewbits.errors import Refused, RequestError
from fewbits.formats import common, inputs
from fewbits.formats.awq import AWQ
from fewbits.formats.base import Entry, Layout, Refusal
from fewbits.formats.bitsandbytes import BitsAndBytes
from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.formats.fewbits import Fewbits
from fewbits.formats.gguf_layout import GGUF
from fewbits.formats.gptq import GPTQ
from fewbits.grids import Int

_ALL = (CompressedTensors, GPTQ, AWQ, GGUF, Fewbits, BitsAndBytes)
LAYOUTS: dict[str, type[Any]] = {kind.name: kind for kind in _ALL}

# Inference engines run these as one matrix, so their members must share bits, group size and symmetry.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def get(name: str) -> Layout:
    """The layout of that name, for its rules. Raises RequestError. To write with it, take :func:`writer`."""
    if name not in LAYOUTS:
        raise RequestError(f"format {name!r} is unknown; allowed: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]()


def writer(name: str, entries: Sequence[Entry], dtype: str | None = None) -> Layout:
    """The layout that writes a model of these entries. Raises Refused before any work when it cannot store one of them.

    ``dtype`` is that of what stays dense, for formats that say it of every weight. The layout is read back from the
    configuration that it will write, so what ``pack`` stores and ``config`` says agree.
    """
    layout: Any = get(name)
    if dtype is not None and hasattr(layout, "dtype"):
        layout = replace(layout, dtype=dtype)
    require(layout, entries)
    return type(layout).read(layout.config(entries))


def modules(names: Iterable[str], layout: Layout) -> dict[str, tuple[str, ...]]:
    """Modules that have tensors of ``layout``, by path, each with the last parts of their names.

    A ``weight`` alone is a dense module.
    """
    longest = sorted(layout.suffixes, key=len, reverse=True)
    found: dict[str, list[str]] = {}
    for name in names:
        suffix = next((s for s in longest if name.endswith("." + s)), None)
        if suffix is not None:
            found.setdefault(name[: -len(suffix) - 1], []).append(suffix)
    return {module: tuple(suffixes) for module, suffixes in found.items() if suffixes != ["weight"]}


def require(layout: Layout, entries: Sequence[Entry]) -> None:
    """Raise Refused when ``layout`` cannot store the entries, with every reason and the modules that it concerns."""
    reasons: dict[str, list[str]] = {}
    for refusal in [*layout.check(entries), *_inputs(layout, entries)]:
        reasons.setdefault(refusal.reason, []).append(refusal.name)
    if reasons:
        raise Refused(layout.name, dict(reasons))


def _inputs(layout: Layout, entries: Sequence[Entry]) -> Iterator[Refusal]:
    """Why the inputs of layers cannot be quantized as planned."""
    takes = getattr(layout, "activations", None)
    for e in entries:
        if e.grid is None or e.activations is None:
            continue
        if takes is None:
            yield Refusal(e.name, "it stores weights only; use format compressed-tensors or fewbits for activations")
        elif reason := e.activations.refusal(e.shape[1]) or takes(e):
            yield Refusal(e.name, reason)


def with_cache(config: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """``quantization_config`` that also says of what kind the KV cache should be: ``kv_cache`` in ours,
    ``kv_cache_scheme`` where compressed-tensors can say it (8 bits).
    """
    if kind is None:
        return config
    if "kv_cache_scheme" in config:
        return config | {"kv_cache_scheme": inputs.kv_cache_scheme(kind)}
    return config | {"kv_cache": kind} if config.get("quant_method") == "fewbits" else config


def cache_kind(quantization_config: Mapping[str, Any]) -> str | None:
    """What :func:`with_cache` wrote, or another writer; see :func:`inputs.cache_kind`."""
    return inputs.cache_kind(quantization_config)


def detect(quantization_config: Mapping[str, Any]) -> Layout:
    """The reading layout for a ``quantization_config``. Raises RequestError for a method that we do not read."""
    method = quantization_config.get("quant_method") if isinstance(quantization_config, Mapping) else None
    if not isinstance(method, str) or method not in LAYOUTS:
        raise RequestError(f"quantization method {str(method)[:80]!r} cannot be read; readable: {', '.join(LAYOUTS)}")
    return LAYOUTS[method].read(quantization_config)


def warnings(name: str, entries: Sequence[Entry]) -> list[str]:
    """What the readers of format ``name`` will stumble over although it can be stored, one line each."""
    # llama.cpp runs every matrix by itself, and its mixtures give them different types on purpose.
    families = {} if name == "gguf" else _families(entries)
    found = [_fused(parent, members) for parent, members in families.items()]
    lines = [line for line in found if line]
    if len(lines) > 3:
        lines = [*lines[:3], f"and {len(lines) - 3} more blocks like these"]
    bits = {e.grid.bits for e in entries if e.grid is not None and hasattr(e.grid, "bits")}
    if name in ("compressed-tensors", "gptq") and bits - {4, 8}:
        lines.append(f"vLLM runs 4 and 8 bits only, this has {sorted(bits - {4, 8})}")
    if name == "gptq" and any(not getattr(e.grid, "symmetric", True) for e in entries):
        lines.append("vLLM runs symmetric GPTQ only; GPTQModel and transformers run this")
    grids = {common.stored(e.grid) for e in entries if isinstance(e.grid, Int)}
    if name == "compressed-tensors" and len(grids) > 1 and not all(g.symmetric for g in grids):
        lines.append("transformers cannot load several grids of which one is affine from this format; vLLM can")
    return lines


def _families(entries: Sequence[Entry]) -> dict[tuple[str, tuple[str, ...]], list[Entry]]:
    found: dict[tuple[str, tuple[str, ...]], list[Entry]] = {}
    for e in entries:
        parent, _, last = e.name.rpartition(".")
        for family in _FUSED:
            if last in family:
                found.setdefault((parent, family), []).append(e)
    return found


def _fused(where: tuple[str, tuple[str, ...]], members: Sequence[Entry]) -> str | None:
    if len({e.grid for e in members}) <= 1:
        return None
    return (
        f"vLLM runs {', '.join(where[1])} of {where[0]} as one matrix and wants one grid for them, not {len(members)}"
    )


__all__ = [
    "LAYOUTS",
    "Entry",
    "Layout",
    "Refusal",
    "detect",
    "get",
    "modules",
    "require",
    "warnings",
    "writer",
]
