"""Who will load a checkpoint: rules of transformers, vLLM and llama.cpp, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fewbits import formats
from fewbits.formats import Entry
from fewbits.grids import Int

LOADERS = ("transformers", "vllm", "llama.cpp")
Reason = Callable[[Entry, Any], str | None]


@dataclass(frozen=True)
class Rule:
    """``loader`` breaks on modules of ``format`` (None: any) for which ``reason(entry, grid)`` says something."""

    loader: str
    format: str | None
    reason: Reason


def _bits(*allowed: int) -> Reason:
    return lambda e, g: None if g.bits in allowed else f"{g.bits} bits; it runs {' and '.join(map(str, allowed))}"


def _groups(*allowed: int) -> Reason:
    def reason(e: Entry, g: Any) -> str | None:
        sizes = ", ".join(map(str, allowed))
        return None if g.group in allowed or g.group == e.shape[1] else f"groups of {g.group}; it runs {sizes}"

    return reason


def _symmetric(e: Entry, g: Any) -> str | None:
    return None if g.symmetric else "affine GPTQ; it runs symmetric GPTQ only"


def _whole_groups(e: Entry, g: Any) -> str | None:
    short = g.group != -1 and e.shape[1] % g.group
    return f"{e.shape[1]} columns that groups of {g.group} do not divide" if short else None


_VLLM_INTEGERS = (_bits(4, 8), _groups(-1, 32, 64, 128), _whole_groups)
_PLAIN = ("gptq", "awq", "compressed-tensors")
RULES: tuple[Rule, ...] = (
    *(Rule("vllm", form, reason) for form in _PLAIN for reason in _VLLM_INTEGERS),
    Rule("vllm", "gptq", _symmetric),
    Rule("transformers", "awq", _whole_groups),
    Rule("transformers", "compressed-tensors", _whole_groups),
)

# What a loader cannot read at all, and what it needs beside itself.
UNREAD = {
    ("vllm", "fewbits"): "it does not know the format; convert to compressed-tensors or gptq",
    ("vllm", "gguf"): "its GGUF reader is on the way out; convert to gptq or compressed-tensors",
    ("llama.cpp", "dense"): "it reads .gguf files; convert to gguf",
}
NEEDS = {
    ("transformers", "gptq"): "needs the package gptqmodel",
    ("transformers", "awq"): "needs the package gptqmodel",
    ("transformers", "compressed-tensors"): "needs the package compressed-tensors",
    ("transformers", "bitsandbytes"): "needs the package bitsandbytes",
    ("transformers", "fewbits"): "after `import fewbits`",
    ("transformers", "gguf"): "dequantized, with gguf_file=...",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a loader will take the checkpoint, the rules that it breaks, and what the loader needs."""

    loads: bool
    reasons: tuple[str, ...] = ()
    needs: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"loads": self.loads, "reasons": list(self.reasons), "needs": self.needs}


def verdicts(format: str, entries: Sequence[Entry], damage: int) -> dict[str, Verdict]:
    """What each loader will make of a checkpoint in ``format`` with these modules; ``damage`` counts findings."""
    found = {}
    for loader in LOADERS:
        reasons = [f"{damage} findings of damage"] if damage else []
        reasons += list(_reasons(loader, format, entries))
        found[loader] = Verdict(not reasons, tuple(reasons), NEEDS.get((loader, format)))
    return found


def _reasons(loader: str, format: str, entries: Sequence[Entry]) -> Iterator[str]:
    if (unread := UNREAD.get((loader, format))) is not None:
        yield unread
        return
    if loader == "llama.cpp":
        if format != "gguf":
            yield "it reads .gguf files; convert to gguf"
        return
    broken: dict[str, list[str]] = {}
    for rule in RULES:
        if rule.loader != loader or rule.format not in (None, format):
            continue
        for e in entries:
            if isinstance(e.grid, Int) and (reason := rule.reason(e, e.grid)):
                broken.setdefault(reason, []).append(e.name)
    for reason, names in broken.items():
        yield f"{reason} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
    word = {"vllm": "vLLM", "transformers": "transformers"}[loader]
    kept = [line for line in formats.warnings(format, entries) if line.startswith(word)]
    yield from (line for line in kept if "one matrix" in line or "several grids" in line)
