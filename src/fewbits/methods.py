"""The map of the field: every named method is one line, a choice of grid, solver and transforms.

``--bits``, ``--group-size`` and ``--affine`` change the grid of the line; the defaults are those of the method's paper.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from fewbits.errors import RequestError
from fewbits.grids import NAMED_GRIDS, Grid, Int, clip_ratios
from fewbits.plan import Plan, Recipe, Rule
from fewbits.solve import Exact, Nearest, Solver, Sweep
from fewbits.transform import Awq, Transform

CLIP = clip_ratios(0.7, 13)
BNB = "bitsandbytes"


@dataclass(frozen=True)
class Method:
    """One choice per axis, what the method is in a sentence, and the format it is at home in."""

    summary: str
    grid: Grid
    solver: Solver
    transforms: tuple[Transform, ...] = ()
    format: str = "compressed-tensors"


METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest, no calibration", Int(4, 128), Nearest()),
    "rtn-clip": Method("round to nearest, clipping searched", Int(4, 128, ratios=CLIP), Nearest()),
    "gptq": Method(
        "error feedback in activation order, true-sequential",
        Int(4, 128, ratios=CLIP),
        Sweep(order="activation", static=True),
    ),
    "gptq-paper": Method("error feedback as published: minmax groups fitted on the way", Int(4, 128), Sweep()),
    "awq": Method(
        "activation-aware scales, clipping searched, nearest", Int(4, 128, ratios=CLIP), Nearest(True), (Awq(),)
    ),
    "awq+gptq": Method(
        "activation-aware scales, then error feedback",
        Int(4, 128, ratios=CLIP),
        Sweep(order="activation", static=True),
        (Awq(),),
    ),
    "obq": Method("exact greedy elimination (layers up to 1024 inputs)", Int(4, -1), Exact()),
    "nf4": Method("NormalFloat in blocks of 64 (QLoRA)", NAMED_GRIDS["nf4"], Nearest(), format=BNB),
    "nf4-dq": Method("the same with double quantization", NAMED_GRIDS["nf4-dq"], Nearest(), format=BNB),
    "fp4": Method("bitsandbytes' 4-bit floats in blocks of 64", NAMED_GRIDS["fp4-bnb"], Nearest(), format=BNB),
    "fp4-dq": Method("the same with double quantization", NAMED_GRIDS["fp4-bnb-dq"], Nearest(), format=BNB),
    "llm-int8": Method("LLM.int8()'s weights: int8 by rows", NAMED_GRIDS["llm-int8"], Nearest(), format=BNB),
}


def method(name: str) -> Method:
    """A method by name. Raises RequestError with the allowed names and the nearest one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RequestError(f"method {name!r} is unknown; allowed: {', '.join(METHODS)}{hint}")
    return METHODS[name]


def plan(name: str, bits: int | None, group_size: int | None, symmetric: bool | None, **rest: object) -> Plan:
    """The plan of a named method; None keeps the method's default."""
    m = method(name)
    given = {"bits": bits, "group": group_size, "symmetric": symmetric}
    grid = altered(name, m.grid, {k: v for k, v in given.items() if v is not None})
    return Plan(method=name, rules=(Rule("*", Recipe(grid, m.solver)),), transforms=m.transforms, **rest)  # type: ignore[arg-type]


def altered(name: str, grid: Any, options: dict[str, object]) -> Grid:
    """``grid`` with the options that differ from it. Raises RequestError for one that method ``name`` fixes."""
    options = {k: v for k, v in options.items() if getattr(grid, k, None) != v}
    fixed = [k for k in options if k not in {f.name for f in fields(grid)}]
    if fixed:
        has = getattr(grid, fixed[0], None)
        is_ = "has no such option" if has is None else f"has {has}"
        raise RequestError(f"{fixed[0]} {options[fixed[0]]!r} given, but method {name!r} {is_}; leave it out")
    return replace(grid, **options)
