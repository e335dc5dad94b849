"""Gradients in fixed point: against autograd through the plain operations; the same bits for any number of threads."""

import pytest
import torch
import torch.nn.functional as F

from fewbits.kernels import gradients
from fewbits.kernels.gradients import FixedGradients


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def close(found, want):
    """Codes have 13 bits: the error of a sum stays far below its terms' size."""
    scale = float(want.square().mean().sqrt())
    assert float((found - want).square().mean().sqrt()) < 1e-3 * scale
    assert float((found - want).abs().max()) < 2e-2 * scale


def through(f, context, *leaves):
    """Output and gradients of the leaves, behind a fixed gradient of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    with context:
        y = f(*leaves)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize(("shape", "out"), [((40, 7), 5), ((2, 50, 130), 49), ((300, 64), 200)])
def test_linear(isa, shape, out):
    x, w, bias = make(*shape), make(out, shape[-1], seed=1), make(out, seed=2)
    found = through(F.linear, FixedGradients(), x, w, bias)
    want = through(F.linear, torch.enable_grad(), x.double(), w.double(), bias.double())
    for a, b in zip(found, want, strict=True):
        close(a.double(), b)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("batch", "heads", "kv", "tokens", "width"), [(1, 1, 1, 33, 8), (2, 6, 2, 70, 16), (1, 4, 4, 96, 24)]
)
def test_attention(isa, monkeypatch, batch, heads, kv, tokens, width, causal):
    q, k, v = (make(batch, h, tokens, width, seed=s) for s, h in enumerate((heads, kv, kv)))

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    want = through(attention, torch.enable_grad(), q.double(), k.double(), v.double())
    for rows in (32, 64, 256):
        monkeypatch.setattr(gradients, "ROWS", rows)
        for a, b in zip(through(attention, FixedGradients(), q, k, v), want, strict=True):
            close(a.double(), b)


def test_transposed_views_are_taken():
    """As transformers hands them over: heads split off the last dimension."""

    def attention(x):
        q, k, v = (t.view(1, 64, 4, 16).transpose(1, 2) for t in x.split(64, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(1, 64, 64)

    x = make(1, 64, 192)
    found, want = through(attention, FixedGradients(), x), through(attention, torch.enable_grad(), x.double())
    for a, b in zip(found, want, strict=True):
        close(a.double(), b)


def test_threads_change_nothing():
    x, w = make(1, 64, 96), make(96, 96, seed=1)

    def layer(x, w):
        q = F.linear(x, w).view(1, 64, 3, 32).transpose(1, 2)
        return F.linear(F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(1, 64, 96), w)

    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(through(layer, FixedGradients(), x, w))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_not_taken_is_left_to_torch():
    x, w = make(1, 4, 8), make(3, 8, seed=1)
    found, want = through(F.linear, FixedGradients(), x, w), through(F.linear, torch.enable_grad(), x, w)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
