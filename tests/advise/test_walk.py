"""The model of a run: laws of its fits, and one run against its prediction."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fewbits import Tune, api
from fewbits.advise import machine, walk
from fewbits.advise.machine import Law, Machine, Power
from tests.tiny import tiny_model


def test_a_power_goes_through_both_points():
    p = Power.through((512, 512**2.5 * 1e-9), (1024, 1024**2.5 * 1e-9), 0.0, 3.0)
    assert p.exponent == pytest.approx(2.5) and p(2048) == pytest.approx(2048**2.5 * 1e-9)
    assert Power.through((512, 1.0), (1024, 64.0), 0.0, 3.0).exponent == 3.0  # bounds
    assert Power.through((512, 1.0), (1024, 64.0), 0.0, 3.0)(1024) == pytest.approx(64.0)


def test_a_law_finds_the_cost_of_rows_and_of_columns(monkeypatch):
    """With a clock that advances as the work says, the law is found exactly."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(w: torch.Tensor, stats: object) -> None:
        out, columns = w.shape
        now[0] += 1e-9 * columns**3 + out * 2e-8 * columns**2

    found = machine.law(work, calibrated=True)
    assert found(300, 4096) == pytest.approx(1e-9 * 4096**3 + 300 * 2e-8 * 4096**2, rel=1e-6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def model(llama: Path, **options: object) -> walk.Model:
    job = api.quantize(llama, "x", dry_run=True, group_size=32, **options)  # type: ignore[arg-type]
    return walk.Model(job, 1000)  # type: ignore[arg-type]


def test_memory_by_hand(llama):
    """Two blocks of 64 x 96: without calibration a block in float32 beside its file decides."""
    found = model(llama, method="rtn")
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64
    peak, phases = found.peak()
    assert {p.name: p.bytes for p in phases}["load"] == 8 * block
    assert peak == 1000 + phases[0].bytes and found.acts == 0
    found = model(llama, method="gptq", samples=16, seq_len=32)
    assert found.acts == 16 * 32 * 64 * 4
    phases = {p.name: p.bytes for p in found.peak()[1]}
    assert phases["observe"] == 4 * block + 16 * 32 * (2 * 64 + 96) * 4 + 96 * 96 * 4
    assert found.peak()[0] == 1000 + found.acts + max(phases.values())


def test_more_work_takes_longer(llama):
    def seconds(**options: object) -> float:
        found = model(llama, **options)
        found.machine = Machine(1e10, 1e10, 1e9)
        law = Law(Power(1e-9, 2), Power(1e-9, 1))
        found._laws = {r: law for r in found.job.recipes.values() if r}
        return found.seconds()

    few, many = (seconds(method="gptq", samples=n, seq_len=64) for n in (64, 512))
    assert seconds(method="rtn") < few < many


def test_tuning_is_counted(llama):
    """Both streams are held, and three products are made for each step where a pass makes one."""
    plain, tuned = (model(llama, method="gptq", samples=16, seq_len=32, tune=t) for t in (False, Tune(1000, 8)))
    assert tuned.acts == 2 * plain.acts
    for each in (plain, tuned):
        each.machine = Machine(1e9, 1e9, 1e9)
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    more = tuned.seconds() - plain.seconds()
    passes = 3 * 1000 * 8 * 32 + 4 * 16 * 32
    assert more == pytest.approx(walk.BEYOND * 2 * passes * (2 * block + 4 * 32 * 64) / 1e9, rel=0.3)
