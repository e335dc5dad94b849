"""Pruned weights in our layout: the same codes come back, in the bits that are left, and damage is named."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import CheckpointError
from fewbits.formats import fewbits as layout
from fewbits.formats import pruned
from fewbits.grids import NAMED_GRIDS, Grid, Int, Int16, Learned
from fewbits.tensor import Quantized

SHAPE = (24, 100)
GRIDS: dict[str, Grid] = {
    "int4": Int(4, 32),
    "int3": Int(3, 16, symmetric=True),
    "int8": Int(8, -1, symmetric=True),
    "int16": Int16(),
    "nf4": NAMED_GRIDS["nf4"],
    "fp8": NAMED_GRIDS["fp8"],
}


def made(grid: Grid, share: float = 0.5, pruned: bool = True) -> Quantized:
    g = torch.Generator().manual_seed(0)
    shape = (SHAPE[0], 128) if grid is GRIDS["nf4"] else SHAPE
    w = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) >= share)
    params = grid.fit(w)
    return Quantized(grid, grid.encode(w, params), params, pruned=pruned)


def stored(q: Quantized) -> dict[str, torch.Tensor]:
    return {name.removeprefix("m."): t for name, t in layout.Fewbits().pack("m", q).items()}


@pytest.mark.parametrize("name", GRIDS)
def test_codes_come_back_from_fewer_bits(name: str) -> None:
    q, whole = made(GRIDS[name]), made(GRIDS[name], pruned=False)
    few, all_of_them = stored(q), stored(whole)
    back = layout.Fewbits((("m", q.grid, q.shape),)).unpack("m", few)
    assert back.pruned and torch.equal(back.codes, q.codes) and torch.equal(back.dense(), q.dense())
    size, before = (sum(t.nbytes for t in ts.values()) for ts in (few, all_of_them))
    saved = whole.bits_per_weight() - q.bits_per_weight()
    # Up to the words that rows of the mask and the two streams are filled up to.
    assert abs((before - size) * 8 - saved * q.codes.numel()) <= 32 * (2 * SHAPE[0] + 1)
    assert saved == pytest.approx(float(q.zeros().double().mean()) * q.grid.bits - 1)  # type: ignore[attr-defined]


def test_a_bit_each_and_the_codes_that_are_left() -> None:
    w = torch.zeros(16, 64)
    w[:, ::2] = torch.randn(16, 32)
    params = Int(4, 64, symmetric=True).fit(w)
    q = Quantized(Int(4, 64, symmetric=True), Int(4, 64, symmetric=True).encode(w, params), params, pruned=True)
    left = int((q.dense() != 0).sum())
    few = stored(q)
    assert few["mask"].shape == (16, 2) and len(few["filled"]) == -(-left * 4 // 32)
    assert int(few["mask"][0, 0]) & 0b1010 == 0  # odd columns are zero


def test_where_all_codes_take_no_more_they_are_stored() -> None:
    for q in (made(Int(4, 32), share=0.05), made(Int(4, 32), pruned=False)):
        few = stored(q)
        assert set(few) == {"codes", "scale", "zero"}
        assert not layout.Fewbits((("m", q.grid, q.shape),)).unpack("m", few).pruned
    learned = Quantized(
        Learned(2), torch.zeros(4, 8, dtype=torch.uint8), {"table": torch.ones(4, 4).half()}, pruned=True
    )
    assert set(stored(learned)) == {"codes", "table"}  # zero is none of its numbers


def test_minus_zero_stays() -> None:
    grid: Grid = GRIDS["fp8"]
    q = made(grid)
    q.codes[0, 0] = 0x80
    back = layout.Fewbits((("m", grid, q.shape),)).unpack("m", stored(q))
    assert torch.equal(back.codes, q.codes)


def test_damage_is_named() -> None:
    q = made(Int(4, 32))
    few, at = stored(q), layout.Fewbits((("m", q.grid, q.shape),))
    with pytest.raises(CheckpointError, match=r"m\.filled"):
        at.unpack("m", few | {"filled": few["filled"][:-1]})
    with pytest.raises(CheckpointError, match=r"m\.mask"):
        at.unpack("m", few | {"mask": few["mask"][:-1]})
    flipped = few["mask"].clone()
    flipped[0] = -1
    with pytest.raises(CheckpointError, match="one of them is damaged"):
        at.unpack("m", few | {"mask": flipped})
    with pytest.raises(CheckpointError, match="filled"):
        at.unpack("m", {k: t for k, t in few.items() if k != "filled"})
    assert layout.Fewbits.suffixes >= pruned.SUFFIXES
