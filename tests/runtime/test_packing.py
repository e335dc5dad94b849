"""Every grid that the C++ products hold: what was packed comes back, and a product is that of the dense weight."""

from __future__ import annotations

import pytest
import torch

from fewbits.grids import NAMED_GRIDS, Bilevel, Grid, Int, Learned, Table
from fewbits.kernels import qlinear, w8a8
from fewbits.runtime import packing
from fewbits.runtime.linear import QuantLinear
from fewbits.solve import Nearest
from fewbits.tensor import Quantized

if not qlinear.available():
    pytest.skip("the C++ kernels are not built", allow_module_level=True)

HELD: dict[str, Grid] = {n: g for n, g in NAMED_GRIDS.items() if not n.startswith(("mxfp6", "llm", "int16"))}
HELD |= {f"learned{b}": Learned(b) for b in (2, 3, 4)} | {f"bilevel{b}": Bilevel(b) for b in (2, 3, 4)}


def quantized(grid: Grid, shape: tuple[int, int] = (40, 256)) -> Quantized:
    return Nearest()(torch.randn(shape, generator=torch.Generator().manual_seed(0)), grid, None)


@pytest.mark.parametrize("name", HELD)
def test_packed_and_back(name: str) -> None:
    q = quantized(HELD[name])
    packed = packing.pack(q)
    assert packed is not None
    kept = {} if isinstance(q.grid, Int) else q.params
    back = packing.unpack(q.grid, packed, kept)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dense(), q.dense())
    torch.testing.assert_close(qlinear.dequantize(packed), q.dense(), rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [("mxfp4", 4.5, torch.bfloat16), ("nvfp4", 5, torch.bfloat16), ("nf4", 4.5, torch.float32)],
)
def test_scales_are_kept_in_16_bits_where_these_hold_them(name: str, bits: float, dtype: torch.dtype) -> None:
    """E8M0 and E4M3 are bfloat16 numbers; NVFP4's global number goes into the table."""
    packed = packing.pack(quantized(HELD[name], (48, 256)))
    assert packed is not None and packed.scale.dtype == dtype
    assert packed.nbytes == 48 * 256 * bits / 8


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("name", HELD)
def test_products_are_those_of_the_dense_weight(name: str, rows: int) -> None:
    q = quantized(HELD[name])
    layer, x = QuantLinear.from_quantized(q), torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))
    exact = x.double() @ q.dense().double().T
    spread = (x.double().abs() @ q.dense().double().abs().T).max()
    assert float((layer(x) - exact).abs().max()) < 1e-5 * float(spread)
    assert float((layer(x.bfloat16()) - x.bfloat16().double() @ q.dense().double().T).abs().max()) < 1e-2 * float(
        spread
    )


def test_blocks_across_rows_stay_loose_and_right() -> None:
    q = quantized(Table("nf4", 64), (24, 100))
    layer, x = QuantLinear.from_quantized(q), torch.randn(3, 100)
    assert packing.pack(q) is None
    torch.testing.assert_close(layer(x), x @ q.dense().T)


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (32, 64)])
def test_int8_codes_come_back(shape: tuple[int, int]) -> None:
    w = torch.randint(-128, 128, shape, dtype=torch.int8)
    columns = torch.tensor([0, shape[1] - 1, shape[1] // 2])
    packed = w8a8.pack(w)
    assert torch.equal(w8a8.unpack(packed), w) and torch.equal(w8a8.unpack(packed, columns), w[:, columns])
