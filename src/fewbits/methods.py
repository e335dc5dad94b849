"""The map of the field: every named method is one line, a choice of grid, solver and transforms.

``--bits``, ``--group-size`` and ``--affine`` change the grid of the line; the defaults are those of the method's paper.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from fewbits.errors import RequestError
from fewbits.grids import Int, clip_ratios
from fewbits.plan import Plan, Recipe, Rule
from fewbits.solve import Exact, Nearest, Solver, Sweep
from fewbits.transform import Awq, Transform

CLIP = clip_ratios(0.7, 13)


@dataclass(frozen=True)
class Method:
    """One choice per axis, and what the method is in a sentence."""

    summary: str
    grid: Int
    solver: Solver
    transforms: tuple[Transform, ...] = ()


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
    grid = replace(m.grid, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    return Plan(method=name, rules=(Rule("*", Recipe(grid, m.solver)),), transforms=m.transforms, **rest)  # type: ignore[arg-type]
