"""The output head: quantized on request only, refused where it is the embedding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits import api, formats
from fewbits.cli import main
from fewbits.errors import RequestError
from fewbits.formats import writer
from fewbits.grids import Int
from fewbits.model import Source
from fewbits.pipeline.job import Job
from fewbits.pipeline.walk import solve_one
from fewbits.solve import Sweep
from fewbits.stats import Stats
from fewbits.storage import Checkpoint
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = " ".join(f"the quick brown fox number {i} jumps over {i * 7 % 13} lazy dogs" for i in range(400))
SMALL: dict[str, Any] = {"samples": 12, "seq_len": 16, "group_size": 16, "compute": "fp32", "calibration": [TEXT]}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model("mistral", tmp_path_factory.mktemp("untied"), vocab_size=320)
    tiny_tokenizer(path, TEXT)
    return path


def stored_head(out: Path) -> Any:
    file = Checkpoint.open(out)
    layout = formats.detect(json.loads((out / "config.json").read_text())["quantization_config"])
    parts = {n.removeprefix("lm_head."): file.tensor(n) for n in file.names() if n.startswith("lm_head.")}
    assert "weight" not in parts
    return layout.unpack("lm_head", parts)


def test_it_stays_dense_unless_asked(untied: Path, tmp_path: Path) -> None:
    api.quantize(untied, tmp_path / "out", method="rtn", format="fewbits", **SMALL)
    assert torch.equal(
        Checkpoint.open(tmp_path / "out").tensor("lm_head.weight"), Source.open(untied).head().weight.half()
    )


def test_nearest_codes_and_the_cost(untied: Path, tmp_path: Path) -> None:
    result = api.quantize(untied, tmp_path / "out", method="rtn", format="fewbits", bits=4, lm_head=True, **SMALL)
    grid, w = Int(4, 16), Source.open(untied).head().weight.detach()
    params = grid.fit(w)
    q = stored_head(tmp_path / "out")
    assert torch.equal(q.codes, grid.encode(w, params))
    assert result.tensors == 15
    census = fewbits.evaluate.census(tmp_path / "out", check=True)
    assert census.bits_per_weight == pytest.approx(result.bits_per_weight, rel=1e-3)


@pytest.mark.parametrize("format", ["fewbits", "gptq", "compressed-tensors"])
def test_the_sweep_sees_what_enters_the_head_of_the_quantized_model(untied: Path, tmp_path: Path, format: str) -> None:
    settings = SMALL | {"group_size": 32}
    result = api.quantize(
        untied, tmp_path / "out", method="gptq", format=format, bits=4, symmetric=True, lm_head=True, **settings
    )
    q = stored_head(tmp_path / "out")
    model, tokenizer = fewbits.load(tmp_path / "out", dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(fewbits.model.rows(tokenizer, [TEXT], 12, 16)).logits
    torch.testing.assert_close(logits, seen[0] @ q.dense().t(), rtol=1e-3, atol=1e-3)
    stats = Stats.empty(64)
    stats.update(seen[0])
    job: Any = api.quantize(
        untied, tmp_path / "x", method="gptq", format=format, bits=4, symmetric=True, dry_run=True, **settings
    )
    assert isinstance(job, Job)
    recipe = next(r for r in job.recipes.values() if r)
    assert isinstance(recipe.solver, Sweep)
    again, event = solve_one(Source.open(untied).head().weight, recipe, stats, writer("fewbits", []))
    assert (again.codes == q.codes).float().mean() > 0.99
    mine = [json.loads(x) for x in (tmp_path / "out/fewbits_events.jsonl").read_text().splitlines()][-1]
    assert mine["name"] == "lm_head" and mine["tokens"] == 12 * 16
    assert mine["error"] == pytest.approx(event["error"], rel=0.02)
    assert result.kl is not None and model.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)


def test_a_recipe_names_it(untied: Path, tmp_path: Path) -> None:
    job: Any = api.quantize(untied, tmp_path / "x", method="rtn", format="fewbits", dry_run=True, lm_head=True, **SMALL)
    recipe = tmp_path / "recipe.yaml"
    head, every = job.plan.rules
    eight = dataclasses.replace(head.recipe, grid=dataclasses.replace(head.recipe.grid, bits=8))
    recipe.write_text(dataclasses.replace(job.plan, rules=(dataclasses.replace(head, recipe=eight), every)).to_yaml())
    api.quantize(untied, tmp_path / "out", recipe=recipe, **SMALL)
    assert stored_head(tmp_path / "out").grid.bits == 8


def test_refusals(untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = tiny_model("llama", tmp_path / "tied", vocab_size=320)
    tiny_tokenizer(tied, TEXT)
    argv = ["quantize", str(tied), str(tmp_path / "out"), "--method", "rtn", "--format", "fewbits", "--lm-head"]
    assert main([*argv, "--group-size", "16"]) == 2
    assert "tied weights" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="'awq' keeps lm_head as it is; quantize it with fewbits"):
        api.quantize(untied, tmp_path / "out", method="awq", format="awq", lm_head=True, **SMALL | {"group_size": 32})
    with pytest.raises(RequestError, match="q4_k_m decides that itself"):
        api.quantize(untied, tmp_path / "out", method="q4_k_m", lm_head=True, **SMALL)
    (tmp_path / "r.yaml").write_text("rules: []")
    with pytest.raises(RequestError, match="recipe"):
        api.quantize(untied, tmp_path / "out", recipe=tmp_path / "r.yaml", lm_head=True, **SMALL)
