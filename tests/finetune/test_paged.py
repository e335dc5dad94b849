"""Paged AdamW: torch's losses to the last digits, memory within its bound, states through a kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.errors import FewbitsError, RequestError
from fewbits.finetune import paged
from fewbits.finetune.paged import PagedAdamW, signed, unsigned


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s)) for s in ((40, 33), (7,), (300, 20), ())]


def losses(optimizer: Any, params: list[torch.nn.Parameter], steps: int = 50, seed: int = 1) -> list[float]:
    """A quadratic with noise, clipped unevenly: gradients of very different sizes."""
    torch.manual_seed(seed)
    found = []
    for _ in range(steps):
        loss = sum(((p * (i + 1) - torch.randn(p.shape)) ** 2).mean() * 10.0 ** (-i) for i, p in enumerate(params))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        found.append(loss.item())  # type: ignore[union-attr]
    return found


SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("memory", [None, 9 << 20])
def test_losses_are_torchs(memory: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "CHUNK", 512)  # several chunks in a parameter
    a, b = parameters(), parameters()
    groups = lambda ps: [{"params": ps[:2]}, {"params": ps[2:], "weight_decay": 0.0}]  # noqa: E731
    ours = losses(PagedAdamW(groups(a), **SETTINGS, memory=memory), a)
    theirs = losses(torch.optim.AdamW(groups(b), **SETTINGS), b)
    assert max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) <= 1e-6
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_eight_bits_follow_closely() -> None:
    a, b = parameters(), parameters()
    ours, theirs = losses(PagedAdamW(a, **SETTINGS, bits=8), a), losses(torch.optim.AdamW(b, **SETTINGS), b)
    assert theirs[-1] < 0.7 * theirs[0]
    assert abs(ours[-1] - theirs[-1]) < 0.02 * theirs[-1]


def test_maps_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for table, with_sign in ((signed(), True), (unsigned(), False)):
        theirs = functional.create_dynamic_map(signed=with_sign)
        torch.testing.assert_close(table.values, theirs, rtol=0, atol=1e-7)


def test_a_second_moment_never_vanishes_beside_a_first() -> None:
    p = torch.nn.Parameter(torch.zeros(512))
    optimizer = PagedAdamW([p], lr=1.0, weight_decay=0.0, bits=8)
    for _ in range(3):
        p.grad = torch.cat([torch.full((1,), 1.0), torch.full((511,), 1e-5)])
        optimizer.step()
    assert float(p.abs().max()) <= 3.5  # AdamW's own step is at most about lr


@pytest.mark.parametrize("bits", [8, 32])
def test_states_go_on_from_a_file(tmp_path: Path, bits: int) -> None:
    a = parameters()
    first = PagedAdamW(a, **SETTINGS, bits=bits)
    losses(first, a, 5)
    first.save_pages(tmp_path / "pages")
    state, kept = first.state_dict(), [p.detach().clone() for p in a]
    expected = losses(first, a, 5, seed=2)
    b = [torch.nn.Parameter(p) for p in kept]
    second = PagedAdamW(b, **SETTINGS, bits=bits)
    second.load_state_dict(state)
    second.load_pages(tmp_path / "pages")
    assert losses(second, b, 5, seed=2) == expected
    with pytest.raises(FewbitsError, match="bytes of optimizer states"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3))]).load_pages(tmp_path / "pages")


def test_wrong_requests() -> None:
    p = [torch.nn.Parameter(torch.zeros(3))]
    with pytest.raises(RequestError, match="16 bits"):
        PagedAdamW(p, bits=16)
    with pytest.raises(RequestError, match="give at least"):
        PagedAdamW(p, memory=1000)
    with pytest.raises(RequestError, match="float32"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])


RESIDENT = """
import sys, threading, torch
from fewbits.finetune.paged import PagedAdamW
def resident():  # exact; VmRSS in /proc/self/status lags behind by some pages of each processor
    return int([l for l in open("/proc/self/smaps_rollup") if l.startswith("Rss")][0].split()[1]) * 1024
memory, bits = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.zeros(1 << 20)) for _ in range(int(sys.argv[3]))]
for p in params:
    p.grad = torch.ones_like(p)
warm = [torch.nn.Parameter(torch.zeros(1 << 16))]
warm[0].grad = torch.ones(1 << 16)
other = PagedAdamW(warm, bits=bits)
other.step()
before, peak, on, seen = 0, 0, True, 0
def watch():
    global peak, seen
    while on:
        peak, seen = max(peak, resident()), seen + 1
watcher = threading.Thread(target=watch)
watcher.start()
while seen < 20:  # a new thread takes memory of its own, which is not the optimizer's
    pass
before = peak = resident()
optimizer = PagedAdamW(params, bits=bits, memory=memory)
for _ in range(2):
    optimizer.step()
on = False
watcher.join()
print(peak - before, optimizer.state_bytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("bits", "count"), [(32, 4), (8, 16)])
def test_resident_memory_stays_within_its_bound(bits: int, count: int) -> None:
    memory = 8 << 20
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(memory), str(bits), str(count)], capture_output=True, text=True, check=True
    )
    grown, states = map(int, run.stdout.split())
    assert states >= 3.9 * memory
    assert grown <= 1.1 * memory, f"{grown / 2**20:.1f} MiB for {memory / 2**20:.0f}"


def test_on_a_gpu_pages_are_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.finetune import Training
    from fewbits.finetune.train import optimizer_of

    gpu, paged_8bit = torch.device("cuda"), Training(optimizer="paged-adamw-8bit", lr=3e-4)
    assert optimizer_of(Training(), tmp_path, gpu)[0] is torch.optim.AdamW
    with pytest.raises(RequestError, match="the driver moves them"):
        optimizer_of(Training(optimizer="paged-adamw", optimizer_memory=1 << 30), tmp_path, gpu)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(RequestError, match="pip install bitsandbytes"):
            optimizer_of(paged_8bit, tmp_path, gpu)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made, given = optimizer_of(paged_8bit, tmp_path, gpu)
    assert made is bitsandbytes.optim.PagedAdamW8bit and given["lr"] == 3e-4
    made([torch.nn.Parameter(torch.zeros(3))], **given)
    assert optimizer_of(Training(optimizer="paged-adamw"), tmp_path, gpu)[0] is bitsandbytes.optim.PagedAdamW32bit
