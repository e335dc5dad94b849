"""Scores of single predictions from logits, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at once
Logits = Callable[[Tensor], Tensor]


@torch.inference_mode()
def losses(hidden: Tensor, head: Logits, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, float64 ``[n]``, of ``targets [n]`` given ``hidden [n, d]``."""
    found = []
    for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = head(h)
        found.append((logits.logsumexp(-1) - logits.gather(-1, t[:, None])[:, 0]).double())
    return torch.cat(found)


@torch.inference_mode()
def compare(p: tuple[Tensor, Logits], q: tuple[Tensor, Logits], targets: Tensor) -> Tensor:
    """float64 ``[4, n]``: NLL of P, NLL of Q, KL(P||Q), and 1 where both models' likeliest tokens agree.

    ``p`` and ``q`` are (hidden states ``[n, d]``, head). KL is summed over the whole vocabulary in float32; what
    rounding pushes below zero is set to zero, as no divergence is negative. Normalisers come from ``logsumexp``: on
    CPUs ``log_softmax`` of a vocabulary of 50,000 is off by -8e-6 nats on average, always to the same side.
    """
    (hidden_p, head_p), (hidden_q, head_q) = p, q
    found = []
    for hp, hq, t in zip(hidden_p.split(CHUNK), hidden_q.split(CHUNK), targets.split(CHUNK), strict=True):
        lp, lq = head_p(hp), head_q(hq)
        zp, zq = lp.logsumexp(-1, keepdim=True), lq.logsumexp(-1, keepdim=True)
        nll_p, nll_q = ((z - x.gather(-1, t[:, None]))[:, 0] for x, z in ((lp, zp), (lq, zq)))
        same = lp.argmax(-1) == lq.argmax(-1)
        prob = (lp - zp).exp_()
        kl = prob.mul_(lp.sub_(lq).sub_(zp - zq)).sum(-1).clamp_min_(0.0)
        found.append(torch.stack([x.double() for x in (nll_p, nll_q, kl, same)]))
    return torch.cat(found, 1)
