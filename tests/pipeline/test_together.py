"""Several results in one walk: the bytes of each alone, statistics that are carried and not measured again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fewbits import api
from fewbits.errors import RequestError
from fewbits.model import Source
from fewbits.pipeline.acts import Acts
from fewbits.pipeline.forward import run
from fewbits.pipeline.job import Job
from fewbits.pipeline.together import alike, together
from fewbits.pipeline.walk import Walk
from fewbits.plan import Plan
from tests.pipeline.test_quantize import SMALL, make, tree

METHODS = ("gptq", "awq", "awq+gptq", "gptq-paper")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def jobs(model, methods=METHODS, **changes) -> list[Job]:
    how = {"format": "fewbits", "bits": 3, "stream": "original"} | SMALL | changes
    found = [api.quantize(model, "unused", method=m, dry_run=True, **how) for m in methods]
    return [job for job in found if isinstance(job, Job)]


def test_each_output_has_the_bytes_that_it_has_alone(llama, tmp_path):
    found, shared = together(jobs(llama), [tmp_path / m for m in METHODS])
    assert [r.method for r in found] == list(METHODS) and all(r.seconds >= shared for r in found)
    for method in METHODS:
        api.quantize(
            llama, tmp_path / f"{method}-alone", method=method, format="fewbits", bits=3, stream="original", **SMALL
        )
        assert tree(tmp_path / method) == tree(tmp_path / f"{method}-alone")


def test_each_block_is_observed_once(llama, tmp_path, monkeypatch):
    """One forward pass of the calibration rows per block, whatever the number of methods."""
    seen = []
    forward = Walk._call
    monkeypatch.setattr(
        Walk, "_call", lambda self, block, i, x: seen.append((i, tuple(x.shape))) or forward(self, block, i, x)
    )
    together(jobs(llama), [tmp_path / m for m in METHODS])
    rows = [i for i, (count, _, _) in seen if count > 100]  # a short batch is filled up to 256 rows
    probes = [i for i, (count, _, _) in seen if count <= 100]  # the original once, each result once
    assert rows == [0, 1, 2]
    assert sorted(probes) == sorted([0, 1, 2] * (1 + len(METHODS)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "qwen3_moe"])
def test_carried_statistics_are_those_of_the_transformed_block(family, tmp_path):
    """What the solver gets after AWQ's maps equals what a second pass through the folded block would measure."""
    model = make(family, tmp_path / "model")
    (job,) = jobs(model, ("awq",))
    source, walk = job.source, Walk(job.source, job.plan, job.recipes, job.layout)
    acts, _ = job.acts(tmp_path)
    assert acts is not None and job.rows is not None
    before = acts[0].clone()
    stats = walk.gather(0, acts, dict.fromkeys(walk.needs(0), frozenset({"gram", "abs"})))
    block = source.block(0)
    recipes = {n: r for n in source.linears(block) if (r := job.recipes[source.disk_name(0, n)])}
    kept = {s: x.gram.clone() for s, x in stats.items()}
    carried = dict(stats)
    walk._fit(block, recipes, carried)
    assert any(not torch.equal(carried[s].gram, kept[s]) for s in kept)
    assert all(torch.equal(stats[s].gram, kept[s]) for s in kept)  # other lanes still read them

    inputs: dict[int, list[torch.Tensor]] = {}
    forward = lambda: walk._call(block, 0, before)  # noqa: E731
    list(
        run(block, source.stages(block), [forward], lambda s, b, x: inputs.setdefault(s, []).append(x), lambda s: None)
    )
    assert inputs.keys() == carried.keys()
    for stage, xs in inputs.items():
        x = torch.cat([t.reshape(-1, t.shape[-1]) for t in xs])
        torch.testing.assert_close(carried[stage].gram, x.T @ x, rtol=2e-3, atol=2e-3 * float((x.T @ x).abs().max()))
        torch.testing.assert_close(carried[stage].absmax, x.abs().amax(0), rtol=1e-3, atol=1e-4)


def test_interrupted_together_and_resumed(llama, tmp_path):
    whole = [tmp_path / "whole" / m for m in METHODS]
    whole[0].parent.mkdir()
    together(jobs(llama), whole)

    class Stop(BaseException):
        pass

    def stop(event):
        if event["event"] == "block" and event["block"] == 1:
            raise Stop

    again = [tmp_path / m for m in METHODS]
    some = jobs(llama)
    some[2] = dataclasses.replace(some[2], emit=stop)  # the first two lanes have finished this block, the last has not
    with pytest.raises(Stop):
        together(some, again)
    assert not any(out.exists() for out in again)
    together(jobs(llama), again, resume=True)
    assert [tree(out) for out in again] == [tree(out) for out in whole]


def test_what_cannot_be_shared(llama, tmp_path):
    a, b = jobs(llama, ("gptq", "awq"))
    assert alike(a, b) and not alike(a, jobs(llama, ("gptq",), samples=8)[0])
    (own,) = jobs(llama, ("gptq",), stream="quantized")
    with pytest.raises(RequestError, match="stream 'original'"):
        together([a, own], [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(RequestError, match="quantized inputs need statistics"):
        api.quantize(llama, tmp_path / "c", method="smoothquant", stream="original", dry_run=True, **SMALL)
    with pytest.raises(RequestError, match="stream 'both' is unknown"):
        api.quantize(llama, tmp_path / "c", stream="both", dry_run=True, **SMALL)


def test_the_stream_is_part_of_the_recipe(llama):
    (job,) = jobs(llama, ("gptq",))
    assert Plan.from_yaml(job.plan.to_yaml()) == job.plan and job.plan.stream == "original"
    assert Plan.from_yaml(job.plan.to_yaml().replace("stream: original\n", "")).stream == "quantized"


def test_original_inputs_are_the_original_models(llama):
    """``gather`` leaves in ``acts`` what the unchanged model computes."""
    (job,) = jobs(llama, ("gptq",))
    source = Source.open(llama)
    walk = Walk(source, job.plan, job.recipes, job.layout)
    assert job.rows is not None
    acts = Acts(*job.rows.shape, 64)
    for b, ids in acts.batches(job.rows):
        acts[b] = source.embed(ids)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    hidden = model(job.rows[:2], output_hidden_states=True).hidden_states
    for i in range(2):
        walk.gather(i, acts, walk.needs(i))
        torch.testing.assert_close(acts[0][:2], hidden[i + 1].detach(), rtol=1e-4, atol=1e-5)
