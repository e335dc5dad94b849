"""Plans: YAML in and out, first rule wins, nothing is silently ignored; every documented example is valid."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fewbits import methods
from fewbits.errors import RequestError
from fewbits.grids import Int
from fewbits.plan import Plan, Recipe, Rule
from fewbits.solve import Nearest

ROOT = Path(__file__).parents[1]
NAMES = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_survives_yaml(name):
    integer = isinstance(methods.METHODS[name].grid, Int)
    plan = methods.plan(name, *((3, 32, True) if integer else (None, None, None)), format="fewbits")
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert Plan.from_yaml(plan.to_yaml()).digest() == plan.digest()
    recipe = plan.rules[0].recipe
    assert recipe is not None and (not integer or recipe.grid == replace(recipe.grid, bits=3, group=32, symmetric=True))


def test_the_documented_recipe():
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.S)
    assert text is not None
    found = Plan.from_yaml(text.group(1)).assign(NAMES)
    assert found[NAMES[0]] is None and found[NAMES[1]] is None
    attention, mlp = found[NAMES[2]], found[NAMES[3]]
    assert attention is not None and attention.grid == Int(8, 64) and attention.solver == Nearest()
    assert mlp is not None and mlp.grid == Int(4, 64, symmetric=True)


def test_rules():
    a, b = Recipe(Int(4), Nearest()), Recipe(Int(8), Nearest())
    plan = Plan("x", "fewbits", (Rule("*.mlp.*", a), Rule("*", b)))
    assert [plan.assign(NAMES)[n] for n in NAMES] == [b, a, b, a]
    with pytest.raises(RequestError, match=r"'\*\.experts\.\*' decides no weight"):
        Plan("x", "fewbits", (Rule("*.experts.*", a), Rule("*", b))).assign(NAMES)
    with pytest.raises(RequestError, match="no rule matches"):
        Plan("x", "fewbits", (Rule("*.mlp.*", a),)).assign(NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "not YAML"),
        ("just text", "no 'rules'"),
        ("rules: [{recipe: null}]", "form of a plan"),
        (
            "rules: [{match: '*', recipe: {grid: {kind: zip}, solver: {kind: nearest}}}]",
            "'zip' is unknown; allowed: int",
        ),
        ("rules: [{match: '*', recipe: {grid: {kind: int, bit: 4}, solver: {kind: nearest}}}]", "no option 'bit'"),
        ("rules: [{match: '*', recipe: {grid: {kind: int, bits: four}, solver: {kind: nearest}}}]", "given 'four'"),
        ("rules: [{match: '*', recipe: {grid: {kind: int, bits: 17}, solver: {kind: nearest}}}]", "allowed: 2 to 8"),
        ("rules: []\nsurprise: 1", "form of a plan"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(text, message):
    with pytest.raises(RequestError, match=message) as e:
        Plan.from_yaml(text)
    assert "\n" not in str(e.value)


def test_unknown_method():
    with pytest.raises(RequestError, match="did you mean 'gptq'"):
        methods.method("gptx")


@pytest.mark.parametrize(
    ("method", "grid", "format"),
    [
        ("gptq", None, "compressed-tensors"),
        ("nf4", None, "bitsandbytes"),
        ("gptq", "nf4-dq", "bitsandbytes"),
        ("awq", "fp4-bnb", "bitsandbytes"),
        ("gptq", "nvfp4", "compressed-tensors"),
        ("spqr", "nf4", "fewbits"),  # single weights beside the codes
        ("gptq", Int(4, 64), "compressed-tensors"),
    ],
)
def test_what_is_written_where_no_format_is_named(method, grid, format):
    assert methods.home(method, grid) == format
