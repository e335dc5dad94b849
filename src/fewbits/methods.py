"""The map of the field: every named method is one line, a choice of grid, solver and transforms.

``--grid`` puts another grid in its place, ``--bits``, ``--group-size`` and ``--affine`` change it where it has such
options; the defaults are those of the method's paper.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from fewbits.activations import PRESETS, Activations
from fewbits.errors import RequestError
from fewbits.grids import NAMED_GRIDS, Bilevel, Grid, Int, Int16, Learned, clip_ratios
from fewbits.plan import Plan, Recipe, Rule
from fewbits.solve import Exact, Nearest, Sensitive, Solver, Surgeon, Sweep
from fewbits.split import Largest, Outliers, Split
from fewbits.transform import Awq, Smooth, Transform

T = TypeVar("T")
CLIP = clip_ratios(0.7, 13)
BNB = "bitsandbytes"
W8 = Int(8, -1, symmetric=True)


@dataclass(frozen=True)
class Method:
    """One choice per axis, what the method is in a sentence, and the format it is at home in."""

    summary: str
    grid: Grid
    solver: Solver
    transforms: tuple[Transform, ...] = ()
    activations: Activations | None = None
    format: str = "compressed-tensors"
    split: Split | None = None


METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest, no calibration", Int(4, 128), Nearest()),
    "rtn-clip": Method("round to nearest, clipping searched", Int(4, 128, ratios=CLIP), Nearest()),
    "gptq": Method(
        "error feedback in activation order, true-sequential; values as attention mixes them",
        Int(4, 128, ratios=CLIP),
        Sweep(order="activation", static=True, mixed=True),
    ),
    "gptq-paper": Method("error feedback as published: minmax groups fitted on the way", Int(4, 128), Sweep()),
    "gptaq": Method(
        "GPTQ that also takes back what the layers before have lost (GPTQ-v2)",
        Int(4, 128, ratios=CLIP),
        Sweep(order="activation", static=True, cross=0.25, mixed=True),
    ),
    "spqr": Method(
        "error feedback in tiny groups with 3-bit scales; the dearest weights kept beside them (SpQR)",
        Bilevel(3, 16),
        Sweep(damp=1.0, order="activation", static=True),
        format="fewbits",
        split=Outliers(0.2),
    ),
    "squeezellm": Method(
        "a table per row, k-means weighted by the Fisher information, nearest (SqueezeLLM)",
        Learned(3),
        Sensitive(),
        format="fewbits",
    ),
    "squeezellm-sparse": Method(
        "the same; the most sensitive and the largest weights kept beside the codes, 0.45 %",
        Learned(3),
        Sensitive(),
        format="fewbits",
        split=Largest(0.004, 0.0005),
    ),
    "sparsegpt": Method(
        "half of the weights to zero while sweeping (SparseGPT); --grid int4 rounds the others too",
        Int16(),
        Sweep(sparsity="0.5"),
        format="fewbits",
    ),
    "obs": Method(
        "half of the weights to zero, one by one with exact compensation (layers up to 1024 inputs)",
        Int16(),
        Surgeon(),
        format="fewbits",
    ),
    "obd": Method(
        "half of the weights to zero by the diagonal of the Hessian, no compensation",
        Int16(),
        Surgeon(compensate=False),
        format="fewbits",
    ),
    "magnitude": Method(
        "half of the weights to zero, the smallest, no calibration",
        Int16(),
        Surgeon(compensate=False, curved=False),
        format="fewbits",
    ),
    "awq": Method(
        "activation-aware scales, clipping searched, nearest", Int(4, 128, ratios=CLIP), Nearest(True), (Awq(),)
    ),
    "awq+gptq": Method(
        "activation-aware scales, then error feedback",
        Int(4, 128, ratios=CLIP),
        Sweep(order="activation", static=True, mixed=True),
        (Awq(),),
    ),
    "w8a8": Method("8-bit weights per channel, 8-bit inputs per token", W8, Nearest(), activations=PRESETS["int8"]),
    "smoothquant": Method(
        "outliers of the inputs migrated into the weights, then W8A8", W8, Nearest(), (Smooth(),), PRESETS["int8"]
    ),
    "smoothquant-static": Method(
        "SmoothQuant with one calibrated scale per input",
        W8,
        Nearest(),
        (Smooth(),),
        PRESETS["int8-static"],
    ),
    "smoothquant+gptq": Method(
        "SmoothQuant, then error feedback: W4A8",
        Int(4, 128, symmetric=True, ratios=CLIP),
        Sweep(order="activation", static=True, mixed=True),
        (Smooth(),),
        PRESETS["int8"],
    ),
    "llm.int8": Method(
        "int8 by rows, inputs vector-wise; input columns that reach 6.0 stay in 16 bits (LLM.int8())",
        NAMED_GRIDS["llm-int8"],
        Nearest(),
        activations=replace(PRESETS["int8"], outliers=6.0),
        format=BNB,
    ),
    "obq": Method("exact greedy elimination (layers up to 1024 inputs)", Int(4, -1), Exact()),
    "fp8": Method("8-bit floats (E4M3), a scale per channel", NAMED_GRIDS["fp8"], Nearest()),
    "fp8-block": Method("the same, a scale per 128 x 128 block", NAMED_GRIDS["fp8-block"], Nearest()),
    "fp8-tensor": Method("the same, a scale per weight", NAMED_GRIDS["fp8-tensor"], Nearest()),
    "mxfp8": Method("OCP microscaling, E4M3 in blocks of 32", NAMED_GRIDS["mxfp8"], Nearest()),
    "mxfp6": Method("OCP microscaling, E2M3 in blocks of 32", NAMED_GRIDS["mxfp6"], Nearest()),
    "mxfp4": Method("OCP microscaling, E2M1 in blocks of 32", NAMED_GRIDS["mxfp4"], Nearest()),
    "nvfp4": Method("E2M1 in blocks of 16 with E4M3 scales", NAMED_GRIDS["nvfp4"], Nearest()),
    "nf4": Method("NormalFloat in blocks of 64 (QLoRA)", NAMED_GRIDS["nf4"], Nearest(), format=BNB),
    "nf4-dq": Method("the same with double quantization", NAMED_GRIDS["nf4-dq"], Nearest(), format=BNB),
    "fp4": Method("bitsandbytes' 4-bit floats in blocks of 64", NAMED_GRIDS["fp4-bnb"], Nearest(), format=BNB),
    "fp4-dq": Method("the same with double quantization", NAMED_GRIDS["fp4-bnb-dq"], Nearest(), format=BNB),
}


def method(name: str) -> Method:
    """A method by name. Raises RequestError with the allowed names and the nearest one."""
    return chosen("method", name, METHODS)


def named(grid: str) -> Grid:
    """A grid by name. Raises RequestError with the allowed names and the nearest one."""
    return chosen("grid", grid, NAMED_GRIDS)


def home(name: str, grid: str | Grid | None = None) -> str:
    """The format that a method's result is written in when none is named. A named grid that is at home elsewhere takes
    methods there that would store it like any other: GPTQ's NF4 is a checkpoint of bitsandbytes.
    """
    m = method(name)
    homes = [o.format for o in METHODS.values() if isinstance(grid, str) and o.grid == named(grid)]
    return homes[0] if homes and m.format == Method.format else m.format


def chosen(kind: str, name: str, table: Mapping[str, T]) -> T:
    """``table[name]``. Raises RequestError that says what is allowed."""
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RequestError(f"{kind} {name!r} is unknown; allowed: {', '.join(table)}{hint}")
    return table[name]


def plan(
    name: str,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    grid: str | Grid | None = None,
    sparsity: str | None = None,
    **rest: object,
) -> Plan:
    """The plan of a named method; None keeps the method's default. ``grid`` is a name or a grid of one's own."""
    m = method(name)
    if sparsity is not None:
        if not getattr(m.solver, "wants_zero", False):
            raise RequestError(
                f"sparsity {sparsity} given, but method {name!r} prunes nothing; use sparsegpt, obs, obd or magnitude"
            )
        m = replace(m, solver=replace(m.solver, sparsity=sparsity))  # type: ignore[type-var]
    given = {"bits": bits, "group": group_size, "symmetric": symmetric}
    chosen = m.grid if grid is None else searched(named(grid), m.grid) if isinstance(grid, str) else grid
    chosen = altered(chosen, {k: v for k, v in given.items() if v is not None}, f"method {name!r}", grid)
    rules = (Rule("*", Recipe(chosen, m.solver, m.activations, m.split)),)
    return Plan(method=name, rules=rules, transforms=m.transforms, **rest)  # type: ignore[arg-type]


def searched(grid: Any, home: Any) -> Grid:
    """``grid`` with a search for its scales where the method's own grid ``home`` has one."""
    wanted = len(getattr(home, "ratios", ())) > 1 and hasattr(grid, "search")
    return replace(grid, ratios=grid.search) if wanted else grid


def altered(grid: Any, options: dict[str, Any], method: str, name: object = None) -> Grid:
    """``grid`` with the options that differ from it. Raises RequestError for one that it does not leave open."""
    options = {k: v for k, v in options.items() if getattr(grid, k, None) != v}
    fixed = [k for k in options if k not in {f.name for f in fields(grid)}]
    if fixed:
        whose = method if name is None else f"grid {name if isinstance(name, str) else type(name).__name__!r}"
        has = getattr(grid, fixed[0], None)
        is_ = "has no such option" if has is None else f"has {has}"
        raise RequestError(f"{fixed[0]} {options[fixed[0]]!r} given, but {whose} {is_}; leave it out")
    return replace(grid, **options)
