"""Fake quantization: C++ against its specification, and that against autograd through a rounding of gradient 1."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.kernels.fakequant import fake_affine, reference_fake_affine, reference_fake_affine_grad

CASES = [(7, 64, 16, 0, 15), (5, 70, 32, 0, 3), (3, 33, -1, 1, 255), (4, 24, 1, 0, 7), (1, 5, 128, 1, 3)]


def problem(rows: int, columns: int, group: int, qmax: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(columns)
    groups = 1 if group == -1 else -(-columns // group)
    w, g = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    s = torch.rand(rows, groups, generator=generator) / qmax * 3 + 1e-3
    z = torch.randint(0, qmax + 1, (rows, groups), generator=generator).float()
    w[0, :3] = torch.tensor([0.5, 1.5, -2.5]) * s[0, 0]  # ties
    w[0, 3] = 1e30
    return w, s, z, g


@pytest.mark.parametrize(("rows", "columns", "group", "qmin", "qmax"), CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_native_is_the_specification(isa, rows, columns, group, qmin, qmax, threads):
    w, s, z, g = problem(rows, columns, group, qmax)
    whole = columns if group == -1 else group
    expected = reference_fake_affine(w, s, z, whole, qmin, qmax)
    of_w, of_s = reference_fake_affine_grad(g, w, s, z, whole, qmin, qmax)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        w.requires_grad_(), s.requires_grad_()
        made = fake_affine(w, s, z, group, qmin, qmax)
        made.backward(g)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made, expected)
    assert torch.equal(w.grad, of_w)
    torch.testing.assert_close(s.grad, of_s, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns", "group", "qmin", "qmax"), CASES[:3])
def test_specification_is_autograd_through_rounding(rows, columns, group, qmin, qmax):
    w, s, z, g = (t.double() for t in problem(rows, columns, group, qmax))
    w[0, 3] = 0.1
    whole = columns if group == -1 else group
    index = torch.arange(columns) // whole
    w.requires_grad_(), s.requires_grad_()
    u = w / s[:, index]
    v = (u + (torch.round(u) - u).detach() + z[:, index]).clamp(qmin, qmax)
    made = (v - z[:, index]) * s[:, index]
    made.backward(g)
    of_w, of_s = reference_fake_affine_grad(g, w.detach(), s.detach(), z, whole, qmin, qmax)
    assert torch.equal(made.detach(), reference_fake_affine(w.detach(), s.detach(), z, whole, qmin, qmax))
    torch.testing.assert_close(w.grad, of_w)
    torch.testing.assert_close(s.grad, of_s)


def test_gradients_of_scales_are_the_same_bits_on_every_processor():
    from fewbits.kernels import _table

    if _table.C is None:
        pytest.skip("no C++ extension")
    found = []
    try:
        for level in ("portable", "avx2", "avx512"):
            _table.C.limit_isa(level)
            w, s, z, g = problem(6, 200, 64, 15)
            s.requires_grad_()
            fake_affine(w, s, z, 64, 0, 15).backward(g)
            found.append(s.grad)
    finally:
        _table.C.limit_isa("amx")
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nan_stays_nan(isa):
    w, s, z, _ = problem(2, 40, 16, 15)
    w[1, 7] = torch.nan
    made = fake_affine(w, s, z, 16, 0, 15)
    assert made.isnan().nonzero().tolist() == [[1, 7]]


def test_wrong_shapes_are_refused():
    w, s, z, _ = problem(2, 40, 16, 15)
    with pytest.raises(RequestError, match=r"groups of 8\]; got float32\[2, 40\]"):
        fake_affine(w, s, z, 8, 0, 15)
    with pytest.raises(RequestError, match="float64"):
        fake_affine(w.double(), s, z, 16, 0, 15)
