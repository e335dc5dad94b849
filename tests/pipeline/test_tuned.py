"""`--tune` in the walk: every method, same bytes whatever the threads, resumption, what is told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from fewbits import Tune, api
from fewbits.errors import RequestError
from fewbits.runtime import load
from tests.pipeline.test_quantize import TEXT, Stop, make, stop_after, tree

SMALL = {"samples": 16, "seq_len": 32, "compute": "fp32", "calibration": [TEXT], "format": "fewbits"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def tuned(out: Path) -> list[dict]:
    lines = [json.loads(x) for x in (out / "fewbits_events.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == "tune"]


GROUPED = {"group_size": 16, "bits": 3}
METHODS = {
    **dict.fromkeys(("rtn", "gptq", "gptq-paper", "gptaq", "awq", "awq+gptq"), GROUPED),
    **{m: {} for m in ("nf4", "mxfp4", "fp8", "squeezellm", "squeezellm-sparse", "llm.int8", "w8a8")},
    "sparsegpt": {"grid": "int4", "group_size": 16},
    "spqr": {"group_size": 16},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, llama, tmp_path):
    out = tmp_path / "out"
    result = api.quantize(llama, out, method=method, tune=Tune(20, 8), **(SMALL | METHODS[method]))
    events = tuned(out)
    assert [e["block"] for e in events] == [0, 1, 2] and all(e["after"] <= e["before"] for e in events)
    if method in ("rtn", "awq"):
        assert all(e["after"] < 0.9 * e["before"] for e in events)
    assert result.kl is not None
    model, tokenizer = load(out)
    with torch.no_grad():
        assert bool(torch.isfinite(model(**tokenizer("the quick brown fox", return_tensors="pt")).logits).all())


def test_nearest_comes_nearer_to_the_original_than_error_feedback(llama, tmp_path):
    settings = SMALL | {"bits": 2, "group_size": 16}
    feedback = api.quantize(llama, tmp_path / "gptq", method="gptq", **settings).kl
    tuned = api.quantize(llama, tmp_path / "rtn", method="rtn", tune=Tune(80, 8), **settings).kl
    assert tuned < 0.9 * feedback


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "opt", "qwen3"])
def test_families(family, tmp_path):
    source = make(family, tmp_path / "model")
    api.quantize(source, tmp_path / "out", method="rtn", bits=3, group_size=16, tune=Tune(10, 8), **SMALL)
    assert all(e["after"] <= e["before"] for e in tuned(tmp_path / "out"))


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fixed"])
def test_same_bytes_whatever_the_threads(llama, tmp_path, compute):
    before, trees = torch.get_num_threads(), []
    settings = SMALL | {"samples": 21, "seq_len": 48, "compute": compute, "calibration": [TEXT * 2]}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = tmp_path / f"{threads}"
            api.quantize(llama, out, method="gptq", bits=3, group_size=16, tune=Tune(6, 4), **settings)
            trees.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    finally:
        torch.set_num_threads(before)
    assert trees[0] == trees[1]


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_stopping_and_resuming_changes_no_byte(llama, tmp_path, method):
    settings = SMALL | {"method": method, "bits": 3, "group_size": 16, "tune": Tune(8, 8)}
    api.quantize(llama, tmp_path / "whole", **settings)

    with pytest.raises(Stop):
        api.quantize(llama, tmp_path / "out", on_event=stop_after(2), **settings)
    api.quantize(llama, tmp_path / "out", resume=True, **settings)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_short_of_memory_the_bytes_are_the_same(llama, tmp_path):
    for memory in (None, 20_000):
        settings = SMALL | {"method": "gptq", "bits": 3, "group_size": 16, "tune": Tune(8, 8), "max_memory": memory}
        api.quantize(llama, tmp_path / f"{memory}", **settings)
    assert tree(tmp_path / "None") == tree(tmp_path / "20000")


def test_progress_is_told(llama, tmp_path):
    seen = []
    settings = SMALL | {"method": "rtn", "bits": 3, "group_size": 16, "tune": Tune(5, 8)}
    api.quantize(llama, tmp_path / "out", on_event=seen.append, **settings)
    steps = [(e["block"], e["step"], e["steps"]) for e in seen if e["event"] == "tuning"]
    assert steps == [(b, k, 5) for b in range(3) for k in range(1, 6)]


def test_what_cannot_go_together(llama, tmp_path):
    with pytest.raises(RequestError, match="brings the quantized stream back"):
        api.quantize(llama, tmp_path / "out", method="rtn", tune=True, stream="original", **SMALL)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rules: [{match: '*', recipe: null}]")
    with pytest.raises(RequestError, match="the recipe decides"):
        api.quantize(llama, tmp_path / "out", recipe=recipe, tune=True, **SMALL)
