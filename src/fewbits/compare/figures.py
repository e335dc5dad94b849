"""What is kept of the scores of a model's predictions: a histogram of KL, and the worst-predicted tokens in context."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

BINS = np.linspace(-8.0, 2.0, 61)
"""Edges of the histogram, log10 of nats."""
WORST, BEFORE, AFTER = 12, 24, 6


def histogram(kl: Tensor) -> dict[str, Any]:
    """Counts of ``kl [n]`` (nats) in bins of log10; what is below the first edge or above the last joins that bin."""
    low, high = BINS[0] + 1e-9, BINS[-1] - 1e-9
    logs = np.log10(np.maximum(kl.numpy(), 1e-300)).clip(low, high)
    return {"edges": BINS.round(6).tolist(), "counts": np.histogram(logs, BINS)[0].tolist()}


def worst(scores: Tensor, ids: Tensor, tokenizer: Any, count: int = WORST) -> list[dict[str, Any]]:
    """The predictions with the largest KL, one of each neighbourhood, with the text around them.

    ``scores`` float64 ``[4, windows * (ctx - 1)]`` as :func:`fewbits.evaluate.score.compare`; ``ids [windows, ctx]``.
    ``p`` and ``q`` are the probabilities that the original and the model gave to the token that came.
    """
    per, found, taken = ids.shape[1] - 1, [], set()
    nll_p, nll_q, kl, same = scores
    for at in kl.argsort(descending=True).tolist():
        window, position = divmod(at, per)
        if any((window, position + d) in taken for d in range(-3, 4)):
            continue
        taken.add((window, position))
        row, next_ = ids[window], position + 1
        found.append(
            {
                "kl": float(kl[at]),
                "p": float((-nll_p[at]).exp()),
                "q": float((-nll_q[at]).exp()),
                "same": bool(same[at]),
                "window": window,
                "position": next_,
                "before": tokenizer.decode(row[max(0, next_ - BEFORE) : next_]),
                "token": tokenizer.decode(row[next_ : next_ + 1]),
                "after": tokenizer.decode(row[next_ + 1 : next_ + 1 + AFTER]),
            }
        )
        if len(found) == count:
            break
    return found
