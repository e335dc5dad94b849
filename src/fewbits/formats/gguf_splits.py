"""Byte-level pre-tokenizers by GGUF's names, as the patterns that cut a text into words, one after the other.

GGUF files do not hold the patterns: readers know them by name. A text is cut by the first pattern, what came out by the
second, and so on; every match is a piece, and so is what lies between two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """Words that end where capitals begin."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST


@dataclass(frozen=True)
class Splits:
    """``whole``: a word that is a token is that token, whatever the merges would make of it."""

    patterns: tuple[str, ...]
    whole: bool = False


SPLITS: dict[str, Splits] = {
    "gpt-2": Splits((GPT2,)),
    "smollm": Splits((DIGIT, GPT2)),
    "llama-bpe": Splits((LLAMA3,), whole=True),
    "dbrx": Splits((LLAMA3,)),
    "qwen2": Splits((_WORDS + r"\p{N}" + _REST,)),
    "qwen35": Splits(
        (
            _CONTRACTION
            + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
    "tekken": Splits((_cased("", r"\p{N}"),), whole=True),
    "gpt-4o": Splits((_cased(_CONTRACTION + "?", r"\p{N}{1,3}"),)),
    "default": Splits((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""Of two names with the same patterns, a description gets the one whose ``whole`` it has, else the first."""

ALIASES = {
    "gpt-2": "mpt olmo jais trillion phi-2 gigachat a.x-4.0 mellum modern-bert exaone4 granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "dbrx": "smaug-bpe glm4 chatglm-bpe",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2",
    "gpt-4o": "llama4 kanana2",
}
_MEANT = {alias: name for name, several in ALIASES.items() for alias in several.split()}


def named(name: str) -> Splits | None:
    """The pre-tokenizer of a name or of another name for the same; None when it is not known here."""
    return SPLITS.get(_MEANT.get(name, name))


def name_of(described: Mapping[str, Any]) -> str | None:
    """The name of the pre-tokenizer of a ``tokenizer.json``; None for one that has none here."""
    patterns = _patterns(described)
    whole = bool(described["model"].get("ignore_merges", False))
    found = [name for name, s in SPLITS.items() if s.patterns == patterns]
    return next((n for n in found if SPLITS[n].whole == whole), found[0] if found else None)


def described(splits: Splits) -> dict[str, Any]:
    """The ``pre_tokenizer`` of a ``tokenizer.json``."""
    patterns = splits.patterns
    last = patterns[-1] == GPT2  # the byte-level step has this pattern built in
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns[: len(patterns) - last]
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": last})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def steps_of(part: Any, key: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the one step that there is."""
    if not isinstance(part, dict):
        return []
    return [s for member in part[key] for s in steps_of(member, key)] if part.get("type") == "Sequence" else [part]


def _patterns(described: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What its steps cut by; None when one of them does something that a pattern cannot say."""
    found: list[str] = []
    for step in steps_of(described.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space", False):
            found += [GPT2] if step.get("use_regex", True) else []
        elif (pattern := _pattern(step)) is not None:
            found.append(pattern)
        else:
            return None
    return tuple(found)


def _pattern(step: Mapping[str, Any]) -> str | None:
    if step["type"] == "Digits":
        return DIGIT if step.get("individual_digits") else None
    pieces = step.get("behavior") == "Isolated" or (step.get("behavior") == "Removed" and step.get("invert"))
    return step["pattern"].get("Regex") if step["type"] == "Split" and pieces else None
