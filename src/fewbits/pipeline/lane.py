"""Lanes: several results made from one model in one walk.

Plans that calibrate on the ``original`` stream see the same inputs, whatever they do to the weights. So each block is
run once, every lane takes from its statistics what it needs, and only fitting, solving and packing are paid per lane.
A transform changes what its lane's solver sees by a map on the statistics, not by another run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewbits import storage
from fewbits.pipeline.acts import Acts
from fewbits.pipeline.probe import Probe
from fewbits.pipeline.walk import Block, Event, Walk
from fewbits.pipeline.work import WorkDir

Emit = Callable[[Event], None]


def part(i: int) -> str:
    """Name of the part that holds block ``i``."""
    return f"block-{i:05d}"


@dataclass
class Lane:
    """One result in the making. ``seconds`` is what it alone has cost so far."""

    walk: Walk
    work: WorkDir
    probe: Probe | None
    emit: Emit
    seconds: float = 0.0

    def done(self, i: int) -> bool:
        """Whether block ``i`` is finished, perhaps by an earlier run."""
        return self.work.done(part(i))

    def store(self, i: int, block: Block) -> None:
        """Finish block ``i``: from here on an interruption does not lose it."""
        self.work.write(part(i), block.tensors, block.events)

    def tell(self, i: int, block: Block, seconds: float) -> None:
        """Events of a finished block."""
        for event in block.events:
            self.emit(event)
            if "fallback" in event:
                self.emit({"event": "note", "message": f"{event['name']}: {event['fallback']}"})
        errors = [e["error"] for e in block.events if "error" in e]
        error = sum(errors) / max(1, len(errors))
        n = self.walk.source.n_blocks
        self.emit({"event": "block", "block": i, "blocks": n, "seconds": seconds, "error": error})

    def stored(self, i: int) -> Mapping[str, Tensor]:
        """The tensors of a finished block."""
        found = storage.Checkpoint.open(self.work.part(part(i)))
        return {k: found.tensor(k) for k in found.names()}

    def skipped(self, i: int) -> None:
        """Tell of a block that an earlier run finished."""
        n = self.walk.source.n_blocks
        self.emit({"event": "block", "block": i, "blocks": n, "seconds": 0.0, "resumed": True})


def share(lanes: Sequence[Lane], acts: Acts) -> float:
    """Finish every block of every lane, moving ``acts`` past the original model; returns the seconds that they shared.

    All lanes read the same source, in the same precision; their probes hold the same rows.
    """
    first, shared = lanes[0], 0.0
    source = first.walk.source
    last = max((i for i in range(source.n_blocks) if not all(lane.done(i) for lane in lanes)), default=-1)
    heads = any(lane.walk.recipes.get(source.head_name) for lane in lanes)
    for i in range(source.n_blocks):
        began = time.perf_counter()
        todo = [lane for lane in lanes if not lane.done(i)]
        needs = merged([lane.walk.needs(i) for lane in todo])
        stats = first.walk.gather(i, acts, needs) if i <= last or heads else {}
        if first.probe is not None:
            first.probe.original(i)
        shared += time.perf_counter() - began
        for lane in lanes:
            began = time.perf_counter()
            if lane in todo:
                block = lane.walk.quantize(i, None, stats)
                lane.store(i, block)
                lane.tell(i, block, time.perf_counter() - began)
            else:
                lane.skipped(i)
            if lane.probe is not None and first.probe is not None:
                lane.probe.reference = first.probe.reference
                lane.probe.quantized(i, lane.stored(i))
            lane.seconds += time.perf_counter() - began
    return shared


def merged(needs: Sequence[Mapping[int, frozenset[str]]]) -> dict[int, frozenset[str]]:
    """What any lane must know of each stage."""
    stages = {stage for n in needs for stage in n}
    return {stage: frozenset().union(*(n.get(stage, frozenset()) for n in needs)) for stage in sorted(stages)}
