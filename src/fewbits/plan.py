"""Recipe and Plan: plain data that says what is done to each weight. Frozen, validated, YAML in and out.

A :class:`Recipe` names one choice per axis for one tensor; a :class:`Plan` holds the transforms, the ordered rules
(the first that matches wins; one that matches nothing is an error) and the calibration. Grids, solvers and transforms
are frozen dataclasses; in YAML each is a mapping with its ``kind``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fewbits.activations import Activations, preset
from fewbits.errors import RequestError
from fewbits.grids import Bilevel, Block, Float, Grid, Int, Int16, Learned, Table, Vectorwise
from fewbits.grids.uniform import SCALE_DTYPES
from fewbits.solve import Descent, Exact, Nearest, Search, Sensitive, Solver, Surgeon, Sweep
from fewbits.solve.prune import holds_zero, uneven
from fewbits.split import Largest, Outliers, Split
from fewbits.tensor import Sparse
from fewbits.transform import Awq, Smooth, Transform

KINDS: dict[str, type] = {"int": Int, "float": Float, "nearest": Nearest, "sweep": Sweep, "exact": Exact, "awq": Awq}
KINDS |= {"int16": Int16}
KINDS |= {"table": Table, "vectorwise": Vectorwise, "block": Block, "search": Search, "smooth": Smooth}
KINDS |= {"descent": Descent}
KINDS |= {"bilevel": Bilevel, "outliers": Outliers, "largest": Largest}
KINDS |= {"learned": Learned, "sensitive": Sensitive, "surgeon": Surgeon}
KV_CACHES = ("int8", "int4", "int2", "fp8")
STREAMS = ("quantized", "original")


@dataclass(frozen=True)
class Recipe:
    """How one weight is quantized: the numbers (``grid``), how codes are chosen (``solver``), what becomes of the
    layer's inputs (``activations``; None leaves them as they are), and which single weights stay off the grid
    (``split``).
    """

    grid: Grid
    solver: Solver
    activations: Activations | None = None
    split: Split | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that it reads."""
        return self.solver.needs | (self.activations.needs if self.activations else frozenset())

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Why the solver cannot work on the grid for a weight ``(out, in)``, known before any work; None if it can."""
        if self.split is not None:
            if not getattr(self.solver, "splits", False):
                return (
                    f"the solver {type(self.solver).__name__.lower()} keeps no single weights; take sweep, or no split"
                )
            if shape[1] > Sparse.WIDEST:
                return f"single weights are kept in layers of up to {Sparse.WIDEST} inputs, this has {shape[1]}"
        if getattr(self.solver, "by_weight", False) and not getattr(self.grid, "by_weight", False):
            return f"the grid {type(self.grid).__name__.lower()} cannot weigh single weights; take the grid learned"
        if getattr(self.solver, "wants_zero", False):
            if self.split is not None:
                return "weights that become zero leave none to keep beside the codes; drop the split or the sparsity"
            if not holds_zero(self.grid):
                return f"zero is no number of the grid {type(self.grid).__name__.lower()}; take int, int16 or float"
            if (reason := uneven(self.solver.sparsity, shape[1], self.grid.period)) is not None:  # type: ignore[attr-defined]
                return reason
        inseparable = getattr(self.grid, "inseparable", None)
        return inseparable(shape) if inseparable and getattr(self.solver, "by_columns", False) else None


@dataclass(frozen=True)
class Rule:
    """Weights whose name matches the glob ``match`` get ``recipe``; None keeps them dense."""

    match: str
    recipe: Recipe | None


@dataclass(frozen=True)
class Calibration:
    """Which rows are observed: ``spec`` is a file or an asset name, ``samples`` rows of ``seq_len`` tokens."""

    spec: str = "c4"
    samples: int = 128
    seq_len: int = 512


@dataclass(frozen=True)
class Tune:
    """Learned rounding after the solver: ``steps`` of descent per block, on ``rows`` calibration rows each; a weight
    may go ``reach`` steps of its grid in all.
    """

    steps: int = 200
    rows: int = 2
    reach: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or not self.reach > 0:
            raise RequestError(
                f"tuning by {self.steps} steps of {self.rows} rows over {self.reach} grid steps does nothing; "
                "give more than 0 of each"
            )


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the output."""

    method: str
    format: str
    rules: tuple[Rule, ...]
    transforms: tuple[Transform, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    compute: str = "bf16"
    dtype: str = "float16"
    seed: int = 0
    outside: tuple[Rule, ...] = ()
    """Rules for weights outside the blocks (embedding, head), rounded without calibration; others stay dense."""
    kv_cache: str | None = None
    stream: str = "quantized"
    """Whose outputs a block is calibrated on: those of the blocks as "quantized" before it, so that it sees their
    errors, or those of the "original" blocks, which are the same for every method."""
    tune: Tune | None = None
    """Refine each block by gradients once it is solved."""

    def __post_init__(self) -> None:
        if self.kv_cache not in (None, *KV_CACHES):
            raise RequestError(f"KV cache {self.kv_cache!r} is unknown; allowed: {', '.join(KV_CACHES)}")
        if self.stream not in STREAMS:
            raise RequestError(f"stream {self.stream!r} is unknown; allowed: {', '.join(STREAMS)}")
        if self.stream == "original" and (why := self.bound_to_quantized):
            raise RequestError(f"stream 'original' given, but {why}; leave it at 'quantized'")
        if self.transforms and "fisher" in self.needs:
            raise RequestError("gradients are those of the original weights; SqueezeLLM goes without transforms")

    def assign(self, names: Sequence[str]) -> dict[str, Recipe | None]:
        """The recipe of each weight. Raises RequestError for a weight without rule or a rule that matches nothing."""
        first = {n: next((i for i, r in enumerate(self.rules) if fnmatch.fnmatchcase(n, r.match)), None) for n in names}
        unused = [r.match for i, r in enumerate(self.rules) if i not in first.values()]
        if unused:
            raise RequestError(
                f"rule {unused[0]!r} decides no weight of this model; "
                f"weights are named like {names[0]!r}: mend or drop the rule"
            )
        lost = [n for n, i in first.items() if i is None]
        if lost:
            raise RequestError(f"no rule matches {lost[0]!r}; end the rules with one that matches '*'")
        return {n: self.rules[i].recipe for n, i in first.items() if i is not None}

    @property
    def bound_to_quantized(self) -> str | None:
        """Why it cannot calibrate on the original stream; None when it can."""
        recipes = [r.recipe for r in self.rules if r.recipe]
        if any(r.activations for r in recipes):
            return "quantized inputs need statistics of what each layer really reads"
        if any("cross" in r.needs for r in recipes):
            return "GPTAQ compares both streams"
        if self.tune:
            return "tuning brings the quantized stream back to the original one"
        return None

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that some rule or transform reads, and "outputs" of blocks where these are tuned."""
        recipes = (r.recipe.needs for r in self.rules if r.recipe)
        tuned = {"outputs"} if self.tune else set()
        return frozenset().union(tuned, *recipes, *(t.needs for t in self.transforms))

    def with_scales(self, dtype: str) -> Plan:
        """The same plan with every scale of 16 or 32 bits stored in ``dtype``; smaller ones are what their grid is."""

        def stored(recipe: Recipe | None) -> Recipe | None:
            if recipe is None or getattr(recipe.grid, "scale", None) not in SCALE_DTYPES:
                return recipe
            return dataclasses.replace(recipe, grid=dataclasses.replace(recipe.grid, scale=dtype))  # type: ignore[type-var]

        return dataclasses.replace(self, rules=tuple(Rule(r.match, stored(r.recipe)) for r in self.rules))

    def with_activations(self, scheme: Activations | None) -> Plan:
        """The same plan with the inputs of every quantized layer quantized by ``scheme``."""
        rules = (Rule(r.match, r.recipe and dataclasses.replace(r.recipe, activations=scheme)) for r in self.rules)
        return dataclasses.replace(self, rules=tuple(rules))

    def to_yaml(self) -> str:
        """The plan as YAML; ``Plan.from_yaml`` gives it back."""
        return str(yaml.safe_dump(to_data(self), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str, common: dict[str, Any] | None = None) -> Plan:
        """Raises RequestError in one line for anything that is not a plan. ``common`` fills what the text does not
        say.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise RequestError(f"the recipe is not YAML: {' '.join(str(e).split())}") from None
        if not isinstance(data, dict) or "rules" not in data:
            raise RequestError("the recipe has no 'rules'; see docs/recipes.md for an example")
        try:
            rules = tuple(Rule(r["match"], _recipe(r.get("recipe"))) for r in data.pop("rules"))
            transforms = tuple(from_data(t) for t in data.pop("transforms", ()))
            outside = tuple(Rule(r["match"], _recipe(r.get("recipe"))) for r in data.pop("outside", ()))
            filled = {"method": "recipe", "format": "fewbits"} | (common or {}) | data
            for name, kind in (("calibration", Calibration), ("tune", Tune)):
                if isinstance(filled.get(name), dict):
                    filled[name] = _build(kind, filled[name], name)
            return cls(rules=rules, transforms=transforms, outside=outside, **filled)
        except (KeyError, TypeError, AttributeError) as e:
            raise RequestError(
                f"the recipe does not have the form of a plan: {e}; see docs/recipes.md for an example"
            ) from None

    def digest(self) -> str:
        """sha256 over the YAML form."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def to_data(value: Any) -> Any:
    """Dataclasses become mappings, registered ones with their ``kind``; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = next((k for k, t in KINDS.items() if t is type(value)), None)
        fields = {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields if kind is None else {"kind": kind} | fields
    if isinstance(value, (tuple, list)):
        return [to_data(v) for v in value]
    return value


def from_data(data: Any) -> Any:
    """Builds a registered dataclass from a mapping with ``kind``; unknown kinds and fields are refused in one line."""
    if not isinstance(data, dict) or data.get("kind") not in KINDS:
        given = data.get("kind") if isinstance(data, dict) else data
        raise RequestError(f"kind {given!r} is unknown; allowed: {', '.join(KINDS)}")
    return _build(KINDS[data["kind"]], {k: v for k, v in data.items() if k != "kind"}, data["kind"])


def _build(cls: type, fields: dict[str, Any], kind: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise RequestError(f"{kind!r} has no option {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
    try:
        return TypeAdapter(cls).validate_python(fields)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise RequestError(f"{kind!r} option {where!r}: {first['msg']} (given {first['input']!r})") from None


def _recipe(data: Any) -> Recipe | None:
    if data is None:
        return None
    if unknown := sorted(set(data) - {"grid", "solver", "activations", "split"}):
        raise RequestError(f"a recipe has no {unknown[0]!r}; allowed: grid, solver, activations, split")
    split = None if data.get("split") is None else from_data(data["split"])
    return Recipe(from_data(data["grid"]), from_data(data["solver"]), _activations(data.get("activations")), split)


def _activations(data: Any) -> Activations | None:
    """A preset's name or a mapping of options."""
    if data is None or isinstance(data, str):
        return data if data is None else preset(data)
    found: Activations = _build(Activations, data, "activations")
    return found
