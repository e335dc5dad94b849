"""Activation checkpointing that makes no product twice.

A block is computed again in the backward pass, so that its activations need not be kept; most of that work is products
with the frozen weights. Their outputs are kept instead and taken the second time, everything else is computed again.
``contexts`` goes to ``torch.utils.checkpoint.checkpoint(..., context_fn=contexts)``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

_now = threading.local()


class _Pass:
    """One run through a checkpointed block: the first fills ``kept``, later ones read it from its start."""

    def __init__(self, kept: list[tuple[Tensor, int]], again: bool):
        self.kept, self.again, self.place = kept, again, 0


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass of one block, and for its repetition."""
    kept: list[tuple[Tensor, int]] = []
    return _run(kept, False), _run(kept, True)


def once(product: Callable[[], Tensor]) -> Tensor:
    """``product()``, or what it gave the first time. Outside of checkpointed blocks it is always computed."""
    run: _Pass | None = getattr(_now, "run", None)
    if run is None:
        return product()
    if run.again:
        run.place += 1
        y, version = run.kept[run.place - 1]
        return y.detach() if y._version == version else product()  # a model that wrote into it needs another
    y = product()
    run.kept.append((y.detach(), y._version))
    return y


@contextmanager
def _run(kept: list[tuple[Tensor, int]], again: bool) -> Iterator[None]:
    before, _now.run = getattr(_now, "run", None), _Pass(kept, again)
    try:
        yield
    finally:
        _now.run = before
