"""The steps between products against their specification in torch."""

from __future__ import annotations

import pytest
import torch

from fewbits.kernels import step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}

if not step.available():
    pytest.skip("the C++ extension is not built", allow_module_level=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 64, 577])
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    x, weight = (torch.randn(3, size) * 5).to(dtype), torch.randn(size).to(dtype)
    got, want = step.rms_norm(x, weight, 1e-5), step.rms_norm_reference(x, weight, 1e-5)
    # Sums of another order move the factor by a last place of float32, and a rounding may then fall the other way.
    torch.testing.assert_close(got, want, rtol=2 * EPS[dtype], atol=1e-7)
    # How many float32 results that leaves equal depends on the processor; two places coarser, nearly all are.
    assert dtype == torch.float32 or (got == want).float().mean() > 0.98
    assert torch.equal(step.rms_norm(torch.zeros_like(x), weight, 1e-5), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_to_the_bit(dtype: torch.dtype) -> None:
    x, angle = torch.randn(5, 64).to(dtype), torch.randn(32).repeat(2)
    cosines, sines = angle.cos().to(dtype), (angle.sin() * torch.ones(64).index_fill(0, torch.arange(32), -1)).to(dtype)
    want, first = x.clone(), x.double()
    step.rotate_reference(want, cosines, sines)
    step.rotate(x, cosines, sines)
    assert torch.equal(x, want)
    a, b = first.chunk(2, -1)
    exact = torch.cat([a * angle[:32].cos() - b * angle[:32].sin(), b * angle[:32].cos() + a * angle[:32].sin()], -1)
    torch.testing.assert_close(x.double(), exact.double(), rtol=0, atol=16 * EPS[dtype])
