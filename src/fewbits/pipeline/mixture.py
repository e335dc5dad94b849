"""Plans of GGUF's mixtures: ``q4_k_m``, ``q4_k_m+imatrix``, ``q4_k_m+gptq``, ``q4_k_m+awq``.

Which type a tensor gets depends on its name, its layer and its number of columns, so the plan is made for one model and
says what each weight becomes, fallbacks included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from fewbits.errors import RequestError
from fewbits.formats import gguf_mixtures, gguf_model, gguf_names
from fewbits.grids import BLOCK_TYPES, Block
from fewbits.model import Source
from fewbits.pipeline.walk import entries_of
from fewbits.plan import Plan, Recipe, Rule
from fewbits.solve import Descent, Search, Solver, Sweep
from fewbits.transform import Awq, Transform

SWEEPS = {32: Sweep(order="activation", static=True, mixed=True), 256: Sweep(mixed=True)}
"""By the columns of a block: short ones are fitted in advance for the sake of the best order, long ones on the way."""

Choice = Callable[[Block], Solver]
WAYS: dict[str, tuple[Choice, tuple[Transform, ...]]] = {
    "": (lambda grid: Search(), ()),
    "imatrix": (lambda grid: Search(importance=True), ()),
    "awq": (lambda grid: Search(importance=True), (Awq(),)),
    "gptq": (lambda grid: Descent(3, SWEEPS[grid.period]), ()),
}
"""How codes are chosen: as llama.cpp does without and with importance, after AWQ's scales, with error feedback."""

NAMES = tuple(f"{m}{way and '+' + way}" for m in gguf_mixtures.MIXTURES for way in WAYS)


def is_mixture(method: str) -> bool:
    """Whether a method's name is that of a mixture."""
    return method.split("+")[0] in gguf_mixtures.MIXTURES


def plan(method: str, source: Source, **rest: Any) -> Plan:
    """The plan of a mixture for the model ``source``. Raises RequestError for an unknown one."""
    name, _, way = method.partition("+")
    if way not in WAYS:
        raise RequestError(
            f"method {method!r} is unknown; allowed after the mixture: {', '.join(w for w in WAYS if w)}"
        )
    solver, transforms = WAYS[way]
    mix, family = gguf_mixtures.mixture(name), gguf_names.family(source.text_config.model_type)
    outside = {n.removesuffix(".weight"): n for n in source.outside()}
    tied = bool(source.text_config.tie_word_embeddings) or not any(n.endswith("lm_head") for n in outside)
    facts = gguf_model.facts_of(source.raw_config, tied, weighted=bool(way))

    def recipe(module: str, shape: tuple[int, ...], solver: Choice) -> Recipe | None:
        stored = gguf_names.stored_name(f"{module}.weight", family)
        kind = gguf_mixtures.kind_of(mix, stored, shape, facts) if stored else "f16"
        return Recipe(Block(kind), solver(Block(kind))) if kind in BLOCK_TYPES else None

    inside = [(e.name, recipe(e.name, e.shape, solver)) for e in entries_of(source)]
    common = Counter(r for _, r in inside).most_common(1)[0][0]
    rules = [Rule(n, r) for n, r in inside if r != common] + [Rule("*", common)]
    around = [(m, recipe(m, source.checkpoint.shape(n), WAYS[""][0])) for m, n in outside.items()]
    extra = tuple(Rule(m, r) for m, r in around if r is not None)
    return Plan(method=method, rules=tuple(rules), transforms=transforms, outside=extra, **rest)
