"""16-bit integers: every code, the error bound, groups, the sweep, the bytes, a layer and a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits import formats
from fewbits.errors import Refused, RequestError
from fewbits.formats import Entry
from fewbits.grids import NAMED_GRIDS, Int16
from fewbits.runtime.linear import QuantLinear
from fewbits.solve import Nearest, Sweep
from fewbits.stats import Stats
from fewbits.tensor import Quantized
from tests.tiny import tiny_model, tiny_tokenizer


def weights(rows: int = 8, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_every_code_is_its_own_nearest() -> None:
    grid, p = Int16(), {"scale": torch.tensor([[2.0**-15]])}
    codes = torch.arange(-32767, 32768, dtype=torch.int16)[None]
    values = grid.decode(codes, p)
    assert values[0, [0, 32767, -1]].tolist() == [-32767 / 32768, 0, 32767 / 32768]
    assert torch.equal(grid.encode(values, p), codes) and grid.levels == codes.numel()
    halfway = values + 2.0**-16  # exact: ties go to the even code
    assert torch.equal(grid.encode(halfway[:, :-1], p), (codes + codes % 2)[:, :-1])
    assert grid.encode(torch.tensor([[-9.0, 9.0]]), p).tolist() == [[-32767, 32767]]


@pytest.mark.parametrize("group", [-1, 32, 40])
def test_error_scales_and_bits(group: int) -> None:
    w, grid = weights(), Int16(group)
    w[3] = 0
    p = grid.fit(w)
    found = grid.decode(grid.encode(w, p), p)
    parts = [w] if group == -1 else w.split(group, 1)
    absmax = torch.stack([part.abs().amax(1) for part in parts], 1)
    assert torch.equal(p["scale"], torch.where(absmax > 0, absmax / 32767, 1.0)) and not found[3].any()
    step = p["scale"][:, torch.arange(96) // (group if group > 0 else 96)]
    assert bool(((found - w).abs() <= step * 0.502).all())
    q = Quantized(grid, grid.encode(w, p), p)
    tensors = formats.writer("fewbits", [Entry("a", q.shape, grid)]).pack("a", q)
    assert sum(8 * t.numel() * t.itemsize for t in tensors.values()) == pytest.approx(grid.cost(q.shape) * w.numel())


@pytest.mark.parametrize("columns", [96, 33])
def test_layout_and_layer(columns: int) -> None:
    q = Nearest()(weights(6, columns), NAMED_GRIDS["int16"], None)
    entries = [Entry("a", q.shape, q.grid)]
    layout = formats.writer("fewbits", entries)
    tensors = {k.removeprefix("a."): t for k, t in layout.pack("a", q).items()}
    back = formats.detect(json.loads(json.dumps(layout.config(entries)))).unpack("a", tensors)
    assert back.grid == q.grid and torch.equal(back.codes, q.codes) and torch.equal(back.dense(), q.dense())
    x = weights(3, columns, 1)
    assert torch.allclose(QuantLinear.from_quantized(back)(x), x @ q.dense().T, atol=1e-5)
    for name in ("gptq", "awq", "compressed-tensors", "bitsandbytes"):
        with pytest.raises(Refused):
            formats.writer(name, entries)
    with pytest.raises(RequestError, match="group size 0"):
        Int16(0)


def test_the_sweep_beats_nearest_on_its_own_loss() -> None:
    w, stats = weights(8, 64), Stats.empty(64, frozenset({"gram"}))
    stats.update(weights(256, 64, 1) @ (weights(64, 64, 2) / 8 + torch.eye(64)))
    gram = stats.gram.double()

    def loss(q: Quantized) -> float:
        e = (q.dense() - w).double()
        return float((e @ gram * e).sum())

    swept = Sweep()(w, Int16(), stats)
    assert swept.codes.dtype == torch.int16
    assert loss(swept) < loss(Nearest()(w, Int16(), None))


def test_a_checkpoint(tmp_path: Path) -> None:
    tiny_tokenizer(tiny_model("llama", tmp_path / "source"))
    how = {"grid": "int16", "format": "fewbits", "dtype": "float32"}
    made = fewbits.quantize(tmp_path / "source", tmp_path / "out", method="rtn", **how)
    assert 16 < made.bits_per_weight < 16.6
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        a, b = (fewbits.load(tmp_path / p)[0](input_ids=ids).logits for p in ("source", "out"))
    assert float((a - b).abs().max()) < 1e-3 * float(a.max() - a.min())
