"""Forward passes that wait at a layer until it is solved.

Calibrating a block truly sequentially (each layer sees inputs computed by the already quantized ones) seems to need
one pass per stage. It does not: each batch's forward pass runs in a greenlet of its own; before a layer that is not
yet solved it hands over its input and sleeps. When every batch has arrived, the layer is solved, its weight replaced,
and all go on. Every linear layer runs once, with its quantized weight. The price is that the activations of all
batches inside one block stay in memory; where they do not fit, ``waiting=False`` runs the block again for each stage
instead, with the same result.

:class:`Beside` runs a second block through the same rows in step with that, for statistics that compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from greenlet import GreenletExit, greenlet
from torch import Tensor, nn

Forward = Callable[[], Tensor]
Observe = Callable[[int, int, Tensor], None]
Solve = Callable[[int], None]
Cut = Callable[[int, Tensor], Tensor]


class Turnstile:
    """Hooks that stop a forward pass before the first layer of each stage that is still closed."""

    def __init__(self, block: nn.Module, stages: Sequence[Sequence[str]]):
        self.block, self.stages = block, stages
        self.open: set[int] = set()
        self.seen: dict[greenlet, set[int]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Installs the hooks for the duration."""
        handles = [
            self.block.get_submodule(name).register_forward_pre_hook(self._hook(i), prepend=True)
            for i, stage in enumerate(self.stages)
            for name in stage
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, stage: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            me = greenlet.getcurrent()
            if stage not in self.open and stage not in self.seen.setdefault(me, set()):
                self.seen[me].add(stage)
                me.parent.switch(stage, inputs[0])

        return stop


def run(
    block: nn.Module,
    stages: Sequence[Sequence[str]],
    forwards: Sequence[Forward],
    observe: Observe,
    solve: Solve,
    waiting: bool = True,
    cut: Cut = lambda batch, x: x,
) -> Iterator[tuple[int, Tensor]]:
    """Run ``forwards`` (one per batch) through ``block``; yields ``(batch, output)``.

    ``cut(batch, x)`` takes padding off what is observed and what is yielded.

    ``observe(stage, batch, x)`` gets the input of each stage for each batch, in batch order; ``solve(stage)`` is called
    once per stage, in order, when every batch that reaches it has been observed, and must leave the weights to go on
    with.
    """
    turnstile = Turnstile(block, stages)
    with turnstile.hooked():
        if waiting:
            yield from _wait(turnstile, forwards, observe, solve, cut)
        else:
            yield from _repeat(turnstile, forwards, observe, solve, cut)


def _wait(
    gate: Turnstile, forwards: Sequence[Forward], observe: Observe, solve: Solve, cut: Cut
) -> Iterator[tuple[int, Tensor]]:
    runs = {b: greenlet(f) for b, f in enumerate(forwards)}
    at: dict[int, int] = {}
    ready = list(runs)
    try:
        for stage in range(len(gate.stages) + 1):
            for b in ready:
                result = runs[b].switch()
                if runs[b].dead:
                    yield b, cut(b, result)
                else:
                    at[b] = result[0]
                    observe(result[0], b, cut(b, result[1]))
            if stage < len(gate.stages):
                solve(stage)
                gate.open.add(stage)
            ready = [b for b, s in sorted(at.items()) if s == stage]
            for b in ready:
                del at[b]
    finally:
        for g in runs.values():
            if not g.dead:
                g.throw(GreenletExit)


def _repeat(
    gate: Turnstile, forwards: Sequence[Forward], observe: Observe, solve: Solve, cut: Cut
) -> Iterator[tuple[int, Tensor]]:
    for stage in range(len(gate.stages)):
        for b, forward in enumerate(forwards):
            g = greenlet(forward)
            result = g.switch()
            while not g.dead and result[0] != stage:
                result = g.switch()
            if not g.dead:
                observe(result[0], b, cut(b, result[1]))
                g.throw(GreenletExit)
        solve(stage)
        gate.open.add(stage)
    for b, forward in enumerate(forwards):
        yield b, cut(b, forward())


class Beside:
    """Another block that keeps step: what each of its stages sees, asked for one stage and batch at a time.

    Every batch must reach every stage (no routed experts). ``waiting`` and ``cut`` as in :func:`run`.
    """

    def __init__(
        self,
        block: nn.Module,
        stages: Sequence[Sequence[str]],
        forwards: Sequence[Forward],
        waiting: bool = True,
        cut: Cut = lambda batch, x: x,
    ):
        self.gate, self.forwards, self.waiting, self.cut = Turnstile(block, stages), forwards, waiting, cut
        self.runs: dict[int, greenlet] = {}

    @contextmanager
    def running(self) -> Iterator[Beside]:
        """Stops at the stages while this is entered."""
        with self.gate.hooked():
            try:
                yield self
            finally:
                for g in self.runs.values():
                    g.throw(GreenletExit)

    def seen(self, stage: int, batch: int) -> Tensor:
        """The input of ``stage``; each batch is asked for stages in rising order."""
        g = self.runs.pop(batch, None) or greenlet(self.forwards[batch])
        at, x = g.switch()
        while at != stage:
            at, x = g.switch()
        if self.waiting:
            self.runs[batch] = g
        else:
            g.throw(GreenletExit)
        return self.cut(batch, x)

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """``(batch, output)`` of the block."""
        for b, forward in enumerate(self.forwards):
            g = self.runs.pop(b, None) or greenlet(forward)
            result = g.switch()
            while not g.dead:
                result = g.switch()
            yield b, self.cut(b, result)
