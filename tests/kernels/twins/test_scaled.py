"""Products of one-byte operands, and rows quantized to them, against plain torch."""

from __future__ import annotations

import pytest
import torch

from fewbits.kernels import gpu
from fewbits.kernels.triton import scaled as module
from fewbits.kernels.triton.rows import quantize_rows
from fewbits.kernels.triton.scaled import scaled

ROWS = (1, 3, 17, 64)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def integers(rows: int, out: int, columns: int) -> tuple[torch.Tensor, gpu.ByteWeight]:
    torch.manual_seed(rows + columns)
    x = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    codes = torch.randint(-128, 128, (out, columns), dtype=torch.int8)
    return x, gpu.pack_bytes(codes, torch.rand(out, 1) * 0.01)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("out", "columns"), [(40, 576), (24, 1536), (65, 77)])
def test_int8(rows: int, out: int, columns: int) -> None:
    """Sums are exact, so only the order of scaling could differ: it does not."""
    x, w = integers(rows, out, columns)
    scale, bias = torch.rand(rows, 1), torch.randn(out)
    want = gpu.reference_scaled(x, scale, w, None, torch.float32)
    assert torch.equal(scaled(x, scale, w, None, torch.float32), want)
    assert error(scaled(x, scale, w, bias, torch.float16), want + bias) < 2**-10


@pytest.mark.parametrize("split", [1, 2, 4])
def test_int8_with_one_scale_for_all_rows_and_in_parts(split: int) -> None:
    x, w = integers(17, 40, 576)
    one = gpu.pack_bytes(w.codes, torch.tensor([[0.01]]))
    want = gpu.reference_scaled(x, torch.tensor([[0.5]]), one, None, torch.float32)
    assert torch.equal(scaled(x, torch.tensor([[0.5]]), one, None, torch.float32, split), want)


def floats(rows: int, out: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    return (torch.randn(rows, columns) * 50).to(gpu.E4M3), (torch.randn(out, columns) * 50).to(gpu.E4M3)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("native", [True, False])
def test_fp8_by_rows(rows: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and not module.native_fp8(torch.empty(0).device):
        pytest.skip("this GPU has no fp8")
    monkeypatch.setattr(module, "native_fp8", lambda device: native)
    x, codes = floats(rows, 40, 576)
    for s in ((40, 1), (1, 1)):
        w, scale, bias = gpu.pack_bytes(codes, torch.rand(s) * 0.01), torch.rand(rows, 1), torch.randn(40)
        want = gpu.reference_scaled(x, scale, w, bias, torch.float32)
        # tensor cores keep about 14 bits of a sum of E4M3 products
        assert error(scaled(x, scale, w, bias, torch.float32), want) < (1e-3 if x.is_cuda else 3e-6)


@pytest.mark.parametrize("groups", [1, 5])
def test_fp8_by_blocks(groups: int) -> None:
    """DeepSeek-V3's scheme: 128 x 128 blocks of the weight, 1 x 128 of x, ragged at the end."""
    x, codes = floats(17, 200, 576)
    w, scale = gpu.pack_bytes(codes, torch.rand(2, 5) * 0.01, (128, 128)), torch.rand(17, groups)
    want = gpu.reference_scaled(x, scale, w, None, torch.float32)
    for split in (1, 2):
        assert error(scaled(x, scale, w, None, torch.float32, split), want) < (1e-3 if x.is_cuda else 3e-6)


def test_fp8_blocks_that_do_not_fit_the_tiles_run_the_reference() -> None:
    x, codes = floats(5, 40, 100)
    w, scale = gpu.pack_bytes(codes, torch.rand(4, 10) * 0.01, (10, 10)), torch.rand(5, 10)
    want = gpu.reference_scaled(x, scale, w, None, torch.float32)
    assert torch.equal(scaled(x, scale, w, None, torch.float32), want)


@pytest.mark.parametrize("dtype", [torch.int8, gpu.E4M3], ids=str)
@pytest.mark.parametrize("columns", [7, 576, 2100])
def test_rows_are_quantized_to_the_same_codes(dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(columns)
    x = torch.randn(5, columns) * torch.tensor([[1e-3], [1.0], [1e3], [0.0], [1.0]])
    x[4, 3] = float("nan")
    for wide in (x, x.half()):
        (codes, scale), (want, s) = quantize_rows(wide, dtype), gpu.reference_rows(wide, dtype)
        torch.testing.assert_close(scale, s, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))


def test_every_tie_of_fp8() -> None:
    """Each code, each midpoint between neighbours, and the float32 numbers beside the midpoints."""
    values = torch.arange(127, dtype=torch.uint8).view(gpu.E4M3).float()
    middle = (values[1:] + values[:-1]) / 2
    around = torch.cat([values, middle, torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0)])
    x = torch.cat([around, -around])[None]  # the largest is 448, so the scale is 1
    (codes, scale), (want, _) = quantize_rows(x, gpu.E4M3), gpu.reference_rows(x, gpu.E4M3)
    assert float(scale) == 1
    assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))


def test_quantized_product_end_to_end() -> None:
    x, w = (
        torch.randn(2, 3, 96),
        gpu.pack_bytes(torch.randint(-127, 128, (24, 96), dtype=torch.int8), torch.ones(24, 1)),
    )
    y = gpu.scaled_linear(*gpu.quantize_rows(x, torch.int8), w, dtype=torch.float32)
    assert y.shape == (2, 3, 24) and error(y, x @ w.dense().T) < 0.02
