"""GGUF's block types: decoding against gguf-py, searching against llama.cpp's bytes, and the laws of a grid."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from fewbits.errors import RequestError
from fewbits.formats import gguf_blocks
from fewbits.grids import BLOCK_TYPES, Block
from fewbits.grids import base as grid_base

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ggml

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "ggml_blocks.npz"
BLOCKS = int(os.environ.get("FEWBITS_BLOCKS", 4096))  # random blocks per type; a million was tried
SPECIAL = (0x0000, 0x8000, 0x0001, 0x83FF, 0x7C00, 0xFC00, 0x7E00, 0x7BFF)  # zeros, subnormal, infinite, NaN, largest


def blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random blocks, one per row, a quarter of them with special numbers as scales."""
    t = BLOCK_TYPES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, t.size), dtype=np.uint8)
    position = 0
    for field in gguf_blocks.FORMATS[kind].fields:
        if isinstance(field, gguf_blocks.Half):
            raw[::4, position : position + 2] = rng.choice(np.array(SPECIAL, "<u2"), (len(raw[::4]), 1)).view(np.uint8)
        position += field.size
    assert position == t.size
    return raw


def decoded(kind: str, raw: np.ndarray) -> torch.Tensor:
    grid = Block(kind)
    return grid.decode(*gguf_blocks.unpack(grid, torch.from_numpy(raw)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_decoding_has_the_bits_of_gguf_py(kind):
    for seed, count in enumerate([min(BLOCKS, 1 << 14)] * -(-BLOCKS >> 14)):
        raw = blocks(kind, count, seed)
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(BLOCK_TYPES[kind].shape.number))
        own = decoded(kind, raw).numpy()
        nan = np.isnan(want)
        np.testing.assert_array_equal(np.isnan(own), nan)
        np.testing.assert_array_equal(own.view(np.int32)[~nan], want.view(np.int32)[~nan])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_size_of_a_block_is_that_of_gguf_py_and_of_the_cost(kind):
    t = BLOCK_TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(t.shape.number)] == (t.shape.block, t.size)
    assert gguf.GGMLQuantizationType(t.shape.number).name.lower() == kind
    assert Block(kind).cost((8, 512)) == 8 * t.size / t.shape.block


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_bytes_survive_unpacking(kind):
    raw = blocks(kind, 64)
    grid = Block(kind)
    codes, params = gguf_blocks.unpack(grid, torch.from_numpy(raw))
    again = gguf_blocks.pack(grid, codes, params)
    if kind == "tq1_0":  # 256 bytes for 243 values: only those that an encoder writes come back
        again_codes, _ = gguf_blocks.unpack(grid, again)
        assert torch.equal(again_codes, codes)
    else:
        np.testing.assert_array_equal(again.numpy(), raw)


@pytest.mark.parametrize("weighted", ["plain", "weighted"])
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_search_gives_llama_cpps_bytes(kind, weighted):
    stored = np.load(GOLDEN)
    importance = torch.from_numpy(stored["importance"]) if weighted == "weighted" else None
    grid = Block(kind)
    own = gguf_blocks.pack(grid, *grid.search(torch.from_numpy(stored["x"]), importance))
    np.testing.assert_array_equal(own.numpy(), stored[f"{kind}.{weighted}"])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_search_agrees_with_the_library(kind, weighted):
    ggml.library()
    torch.manual_seed(0)
    x = torch.randn(512, 1024) * torch.logspace(-6, 1, 512)[:, None]
    x[3] = 0
    x[4, :256], x[5, 256:300], x[8] = 0, 0, 0.5
    x[6], x[7] = x[6].abs(), -x[7].abs()
    x[9:40, ::7] *= 30
    x[40:80] = torch.round(x[40:80] / x[40:80].abs().amax(1, keepdim=True) * 7)  # ties
    importance = torch.rand(1024) ** 4 * 10 + 1e-4 if weighted else None
    grid, t = Block(kind), BLOCK_TYPES[kind]
    own = gguf_blocks.pack(grid, *grid.search(x, importance)).numpy()
    want = ggml.quantize(t.shape.number, own.shape[1], x.numpy(), None if importance is None else importance.numpy())
    differ = np.flatnonzero((own != want).any(1))
    assert not len(differ), f"{len(differ)} rows differ, the first is {differ[0]}"


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_nearest_codes_are_never_worse_than_searched_ones(kind):
    torch.manual_seed(1)
    grid, x = Block(kind), torch.randn(16, 512)
    codes, p = grid.search(x)
    searched, nearest = (grid.decode(c, p) - x for c in (codes, grid.encode(x, p)))
    assert float(nearest.abs().sub(searched.abs()).max()) <= 1e-6
    values = grid.decode(codes, p)
    assert torch.equal(grid.decode(grid.encode(values, p), p), values)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_feedback_is_the_column_by_column_specification(kind):
    torch.manual_seed(2)
    grid = Block(kind)
    w = torch.randn(8, grid.period) * 0.1
    p = grid.fit(w)
    u = torch.randn(grid.period, grid.period).mul(0.02).triu(1) + torch.eye(grid.period)
    index = torch.arange(grid.period) // grid.segment
    a, b = w.clone(), w.clone()
    codes, errors = grid.feedback(a, u, p, index)
    want_codes, want_errors = grid_base.feedback(grid, b, u, p, index)
    assert (codes == want_codes).float().mean() > 0.999  # an offset rounds once more
    torch.testing.assert_close(errors, want_errors, atol=2e-3, rtol=1e-3) if codes.equal(want_codes) else None


def test_a_row_that_is_no_multiple_of_the_block_is_refused():
    with pytest.raises(RequestError, match=r"q4_k has blocks of 256 columns, the weight has 576"):
        Block("q4_k").fit(torch.zeros(2, 576))
    with pytest.raises(RequestError, match=r"block type 'q9' is unknown"):
        Block("q9")


def test_hand_made_block():
    """d = 1: the element of largest magnitude, -8, is code 0; 7 is code 15."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([-8.0, -4.0, 7.0, 3.9])
    grid = Block("q4_0")
    raw = gguf_blocks.pack(grid, *grid.search(x))
    assert bytes(raw[0].tolist()).hex() == "003c" + "80848f8c" + "88" * 12
