"""The numbers of a checkpoint: every quantized module unpacked and looked at, one at a time, and every dense tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.advise.finding import Finding
from fewbits.errors import FewbitsError
from fewbits.formats import Entry, Layout
from fewbits.grids import Block, Int, groups_of
from fewbits.tensor import Quantized

_NAMED = re.compile(r"tensors? (\S+?)(?: |$)")
_CHUNK = 1 << 22
_SCALES = ("scale", "absmax", "nested", "global", "d")


@dataclass(frozen=True)
class Looked:
    """What looking at a module gave: its entry (None when it cannot be read) and what is wrong."""

    entry: Entry | None
    findings: tuple[Finding, ...]


def look(name: str, layout: Layout, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Looked:
    """Unpack one module (``tensors`` by suffix) and check what its format leaves unchecked."""
    try:
        q = layout.unpack(name, tensors)
    except FewbitsError as e:
        found = _NAMED.search(str(e))
        part = found[1].rstrip(",;:") if found and found[1].startswith(name) else name
        return Looked(None, (Finding(_kind(str(e)), part, str(e)),))
    prefix = {p: s for s in tensors for p in _SCALES if p in s}
    entry = Entry(name, q.shape, q.grid, "g_idx" in q.params, activations=q.inputs.scheme if q.inputs else None)
    return Looked(entry, (*_sound(name, q, prefix), *_as_stated(name, q, layout, config)))


def _kind(message: str) -> str:
    """A word for an error of a layout."""
    words = {
        "is missing": "missing tensor",
        "has shape": "wrong shape",
        "not finite": "not finite",
        "holds NaN": "not finite",
        "g_idx": "wrong g_idx",
        "expected torch": "wrong dtype",
        "quantization_config": "config mismatch",
    }
    return next((kind for part, kind in words.items() if part in message), "unreadable module")


def _sound(name: str, q: Quantized, stored: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the numbers can be those of a weight."""
    for key in _SCALES:
        p = q.params.get(key)
        if p is not None and p.is_floating_point() and not bool(torch.isfinite(p.float()).all()):
            yield Finding("not finite", f"{name}.{stored.get(key, key)}", "it holds NaN or infinity")
            return
    w = q.dense()
    if not bool(torch.isfinite(w).all()):
        yield Finding("not finite", name, "its dequantized weights hold NaN or infinity")
        return
    if q.codes.numel() >= 64 and bool((q.codes == q.codes.reshape(-1)[0]).all()):
        yield Finding("blank codes", name, "all its codes are the same: the data was never written, or is lost")
        return
    for key in ("scale", "absmax"):
        if (found := _hidden(q, key, w)) is not None:
            yield Finding("zero scale", f"{name}.{stored.get(key, key)}", f"zero for {found} weights that are not")
    if "g_idx" in q.params:
        yield from _groups(name, q)


def _hidden(q: Quantized, key: str, w: Tensor) -> int | None:
    """How many weights a scale of zero makes zero although their codes are not."""
    p = q.params.get(key)
    if isinstance(q.grid, Block) or p is None or not p.is_floating_point() or not bool((p.float() == 0).any()):
        return None
    whole = q.grid.decode(q.codes, q.params | {key: torch.where(p.float() == 0, 1.0, p.float()).to(p.dtype)})
    count = int(((w == 0) & (whole != 0)).sum())
    return count or None


def _groups(name: str, q: Quantized) -> Iterator[Finding]:
    group, columns = q.grid.period, q.shape[1]
    members = torch.bincount(q.params["g_idx"].long(), minlength=groups_of(columns, group))
    if group != -1 and int(members.max()) > group:
        worst = int(members.argmax())
        yield Finding("wrong g_idx", f"{name}.g_idx", f"group {worst} has {int(members.max())} columns, not {group}")


def _as_stated(name: str, q: Quantized, layout: Layout, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the module is what ``quantization_config`` says of it, where readers rely on that."""
    if layout.name == "gptq" and "g_idx" in q.params and config.get("desc_act") is False:
        yield Finding("config mismatch", f"{name}.g_idx", "its groups are scattered, but desc_act is false")
    says = config.get("sym", not config["zero_point"] if layout.name == "awq" and "zero_point" in config else None)
    if layout.name in ("gptq", "awq") and says is True and isinstance(q.grid, Int) and not q.grid.symmetric:
        yield Finding("config mismatch", f"{name}.qzeros", "sym is true, but its zero points are not in the middle")
    for listed in _excluded(config):
        if name == listed:
            yield Finding("config mismatch", name, "it is packed, but the configuration says that it stays dense")


def _excluded(config: Mapping[str, Any]) -> list[str]:
    """Names that a configuration leaves dense."""
    found: list[str] = []
    for key in ("ignore", "modules_to_not_convert", "llm_int8_skip_modules"):
        value = config.get(key)
        found += [str(v) for v in value] if isinstance(value, list) else []
    return found


def stays_dense(config: Mapping[str, Any], method: str, name: str) -> bool:
    """Whether readers build module ``name`` dense, by the rules of their formats."""
    last = name.rpartition(".")[2]
    if method == "fewbits" or last == "lm_head":
        return True
    listed = _excluded(config)
    if method == "compressed-tensors":
        return any(re.match(p[3:], name) if p.startswith("re:") else name == p or last == p for p in listed)
    if method in ("awq", "bitsandbytes"):
        return any(p in name for p in listed)
    if any(p.startswith("-:") and re.match(p[2:], name) for p in config.get("dynamic") or {}):
        return True
    inside = config.get("modules_in_block_to_quantize")
    return bool(inside) and not any(name.endswith(m) for group in inside or () for m in group)


def look_dense(name: str, t: Tensor) -> Iterator[Finding]:
    """A tensor that is not quantized: finite, and a matrix that is not blank."""
    if not t.is_floating_point() or not t.numel():
        return
    flat, blank = t.reshape(-1), True
    for part in flat.split(_CHUNK):
        low, high = part.float().aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            yield Finding("not finite", name, "it holds NaN or infinity")
            return
        blank = blank and bool(low == 0) and bool(high == 0)
    if blank and t.ndim == 2:
        yield Finding("blank tensor", name, "all its numbers are zero: the data was never written, or is lost")
