"""Which method: rules as data (``rules.yaml``), each with its reason and the figure behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from fewbits.advise.forecast import Forecast
from fewbits.errors import RequestError

_COMPARISON = re.compile(r"(>=|<)\s*(\d+)")
TIGHT = 4.6
"""Bits per weight: where no more than this fits, memory is tight."""


@dataclass(frozen=True)
class Situation:
    """What is asked: a ``target`` of the rules, sequences at a time, tokens of each, and the most ``bits`` per weight
    that the memory holds (None: memory was not said).
    """

    target: str
    batch: int = 1
    context: int = 4096
    bits: float | None = None

    def __post_init__(self) -> None:
        if self.target not in targets():
            raise RequestError(f"target {self.target!r} is unknown; allowed: {', '.join(targets())}")


@dataclass(frozen=True)
class Reason:
    """Why, with the figure behind it and where the figure is from."""

    why: str
    figure: str
    source: str

    def to_json(self) -> dict[str, str]:
        return {"why": self.why, "figure": self.figure, "source": self.source}


@dataclass
class Choice:
    """One way, its ``points``, its reasons, and its plan for the model at hand, if there is one."""

    name: str
    option: Mapping[str, Any]
    points: float = 0.0
    reasons: list[Reason] = field(default_factory=list)
    plan: Forecast | None = None
    fits: bool = True

    @property
    def flags(self) -> str:
        """What to give to ``fewbits quantize``."""
        o = self.option
        named = {"--method": o["method"], "--format": o["format"], "--activations": o.get("activations")}
        found = [f"{flag} {value}" for flag, value in named.items() if value is not None]
        for key, value in (o.get("options") or {}).items():
            found.append("--symmetric" if key == "symmetric" else f"--{key.replace('_', '-')} {value}")
        return " ".join(found)

    def to_json(self) -> dict[str, Any]:
        found = {"name": self.name, "flags": self.flags, "points": self.points, "fits": self.fits}
        found |= {"bits_per_weight": self.option["bits"] if self.plan is None else self.plan.bits_per_weight}
        return found | {
            "size_bytes": None if self.plan is None else self.plan.size_bytes,
            "reasons": [r.to_json() for r in self.reasons],
        }


@dataclass
class Advice:
    """``choices``, the best first; those that do not fit come last. ``also`` and ``warnings`` with their reasons."""

    situation: Situation
    choices: list[Choice]
    also: list[tuple[str, Reason]]
    warnings: list[tuple[str, Reason]]

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.situation.target,
            "batch": self.situation.batch,
            "context": self.situation.context,
            "choices": [c.to_json() for c in self.choices],
            "also": [{"flags": flags} | r.to_json() for flags, r in self.also],
            "warnings": [{"warning": text} | r.to_json() for text, r in self.warnings],
        }


Planner = Callable[[Mapping[str, Any]], Forecast]
"""The plan of an option for the model at hand; raises RequestError when the model cannot have it."""


def advise(situation: Situation, planner: Planner | None = None) -> Advice:
    """Rank the ways that suit a situation. With a ``planner`` sizes are exact and what does not fit comes last; without
    one the bits of the rules' own table are compared with ``situation.bits``.
    """
    rules = _data()["rules"]
    options = {n: o for n, o in _data()["options"].items() if situation.target in o["for"]}
    choices = {n: c for n, o in options.items() if (c := _sized(n, o, situation, planner)) is not None}
    also: list[tuple[str, Reason]] = []
    warnings: list[tuple[str, Reason]] = []
    for rule in rules:
        if not applies(rule["when"], situation):
            continue
        reason = Reason(rule["why"], rule["figure"], rule["source"])
        for name, points in (rule.get("options") or {}).items():
            if name in choices:
                choices[name].points += points
                choices[name].reasons.append(reason)
        also += [(rule["also"], reason)] if "also" in rule else []
        warnings += [(rule["warn"], reason)] if "warn" in rule else []
    ranked = sorted(choices.values(), key=lambda c: (not c.fits, -c.points))
    return Advice(situation, [c for c in ranked if c.reasons], also, warnings)


def _sized(name: str, option: Mapping[str, Any], s: Situation, planner: Planner | None) -> Choice | None:
    choice = Choice(name, option)
    if planner is None:
        choice.fits = s.bits is None or option["bits"] <= s.bits
        return choice
    try:
        choice.plan = planner(option)
    except RequestError:  # the model has no place for it
        return None
    choice.fits = choice.plan.fit is None or choice.plan.fit.spare >= 0
    return choice


def applies(when: Mapping[str, Any], s: Situation) -> bool:
    """Whether every condition of a rule holds."""
    bits = float("inf") if s.bits is None else s.bits
    facts: dict[str, Callable[[Any], bool]] = {
        "target": lambda allowed: s.target in allowed,
        "batch": lambda text: _holds(text, s.batch),
        "context": lambda text: _holds(text, s.context),
        "tight": lambda wanted: (bits < TIGHT) == wanted,
        "at_most": lambda most: bits <= most,
    }
    return all(facts[key](value) for key, value in when.items())


def _holds(text: str, value: int) -> bool:
    found = _COMPARISON.fullmatch(text)
    if found is None:
        raise ValueError(f"rules.yaml compares with {text!r}; >= and < are known")
    return value >= int(found[2]) if found[1] == ">=" else value < int(found[2])


def targets() -> dict[str, str]:
    """Targets and what they mean."""
    return {name: t["about"] for name, t in _data()["targets"].items()}


@cache
def _data() -> dict[str, Any]:
    text = resources.files("fewbits.advise").joinpath("rules.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found
