"""Stats is a commutative monoid: how the tokens are cut into batches, and in which order, does not matter."""

import torch

from fewbits.stats import Stats


def test_batches_commute_and_equal_one_shot():
    x = torch.randn(300, 24)

    def of(*parts):
        s = Stats.empty(24)
        for p in parts:
            s.update(p)
        return s

    whole = of(x)
    gram = x.double().T @ x.double()
    for other in (
        of(x[:7], x[7:200], x[200:]),
        of(x[100:]) + of(x[:100]),
        of(x[:100]) + of(x[100:]),
        whole + of(x[:0]),
    ):
        assert other.count == 300
        assert torch.allclose(other.gram.double(), gram, rtol=1e-5, atol=1e-4)
        assert torch.allclose(other.absmean, x.abs().mean(0), rtol=1e-5)
        assert torch.equal(other.absmax, x.abs().amax(0))


def test_bfloat16_products_are_exact():
    """A gram matrix of bfloat16 inputs is that of the rounded inputs to float32 accuracy."""
    x = torch.randn(4096, 48).bfloat16()
    s = Stats.empty(48)
    s.update(x)
    gram = x.double().T @ x.double()
    assert float((s.gram - gram).norm() / gram.norm()) < 1e-6
    assert torch.equal(s.gram, s.gram.T)
    assert float(torch.linalg.eigvalsh(s.gram.double())[0]) > 0
