"""A model of the walk: how long it takes here and how much memory it needs at most, from shapes alone.

Memory: everything that is loaded now, the activation store, and the largest of the phases that a block goes through
(materialise, wait with all batches inside, solve one weight) and of the probe's last step (two heads in float32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fewbits.advise.machine import Law, Machine, solving, transforming
from fewbits.model import get_weight
from fewbits.pipeline.acts import TOKENS_PER_BATCH
from fewbits.pipeline.job import Job
from fewbits.pipeline.memory import LARGEST
from fewbits.pipeline.probe import CHUNK
from fewbits.plan import Recipe

PROBE_TOKENS = 1024
FLOAT = 4
# Rough, and set by two runs (docs/log.md): what a forward pass costs beyond its products, seconds that a run takes
# whatever its size (calibrated ones load a tokenizer and a text), copies of a gram matrix alive while it is factorised.
BEYOND, GRAMS = 1.35, 6
START, START_CALIBRATED = 0.3, 2.5
TUNED = 6
"""Copies of a block's weights alive while it is tuned: it and the original, places, their gradients, fake weights."""
LOGITS, LOGITS_KEPT = 7, 12
"""Chunks of logits alive in the probe's last step, and with those that are freed but stay with the process."""


@dataclass(frozen=True)
class Phase:
    """Something that holds memory: ``bytes`` beyond what is there all the time."""

    name: str
    bytes: int


@dataclass
class Model:
    """The walk of a checked job. ``base`` bytes are resident before it begins."""

    job: Job
    base: int
    machine: Machine | None = None
    _laws: dict[Any, Law] = field(default_factory=dict)

    # ---- facts -------------------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> bool:
        return bool(self.job.plan.needs)

    @property
    def tokens(self) -> int:
        c = self.job.plan.calibration
        return c.samples * c.seq_len if self.calibrated else 0

    @property
    def width(self) -> int:
        return int(self.job.source.text_config.hidden_size)

    def _inside(self) -> int:
        """Bytes of all batches inside a block, as the job counts them."""
        widest = max(e.shape[1] for e in self.job.entries)
        return self.tokens * (2 * self.width + widest) * FLOAT

    @property
    def waiting(self) -> bool:
        """Whether all batches may wait inside a block at once."""
        return self.job.max_memory is None or self._inside() <= self.job.max_memory // 2

    @property
    def acts(self) -> int:
        """Bytes of the activation store that stay in memory."""
        size = self.tokens * self.width * FLOAT * (2 if self.job.plan.tune else 1)  # the original stream too
        return 0 if self.job.max_memory is not None and size > self.job.max_memory // 4 else size

    def _stages(self, i: int) -> list[list[tuple[tuple[int, int], Recipe | None]]]:
        """Shapes and recipes of each stage of block ``i``."""
        source, block = self.job.source, self.job.source.skeleton(i)
        return [
            [(_shape(block, n), self.job.recipes[source.disk_name(i, n)]) for n in stage]
            for stage in source.stages(block)
        ]

    # ---- memory ------------------------------------------------------------------------------------------------------

    def peak(self) -> tuple[int, list[Phase]]:
        """``(bytes, phases)``, the largest phase first."""
        phases = [p for i in self._different() for p in self._phases(i)]
        phases += self._ends()
        phases.sort(key=lambda p: -p.bytes)
        return self.base + self.acts + phases[0].bytes, phases

    def _phases(self, i: int) -> list[Phase]:
        count, stages = _parameters(self.job.source.skeleton(i)), self._stages(i)
        weights, file = count * FLOAT, count * self.job.source.dtype.itemsize
        biggest = max((_numel(s) for stage in stages for s, r in stage if r), default=0)
        found = [Phase("load", weights + file), Phase("round", weights + 5 * FLOAT * biggest)]
        if not self.calibrated:
            return found
        held = self._inside() if self.waiting else _batch(self) * (2 * self.width + self._widest()) * FLOAT
        grams = [stage[0][0][1] ** 2 * FLOAT for stage in stages if stage and any(r for _, r in stage)]
        together = sum(grams) if self.job.plan.transforms else max(grams, default=0)
        found.append(Phase("observe", weights + held + together))
        if any(r and "gram" in r.solver.needs for stage in stages for _, r in stage):
            columns = max((s[1] for stage in stages for s, r in stage if r), default=0)
            found.append(Phase("solve", weights + held + GRAMS * columns**2 * FLOAT + 4 * FLOAT * biggest))
        if self.job.plan.tune:
            tokens = self.job.plan.tune.rows * self.job.plan.calibration.seq_len
            inside = sum(s[0] + s[1] for stage in stages for s, _ in stage)
            found.append(Phase("tune", TUNED * weights + 2 * tokens * inside * FLOAT))
        return found

    def _widest(self) -> int:
        return max(e.shape[1] for e in self.job.entries)

    def _ends(self) -> list[Phase]:
        source = self.job.source
        rows = max((source.checkpoint.nbytes(n) for n in source.outside()), default=0)
        found = [Phase("store the embedding", rows + rows * (2 if source.dtype.itemsize == FLOAT else 4) // FLOAT)]
        if self.calibrated:
            out, columns = source.head_shape
            heads = 1 if self.job.recipes.get(source.head_name) is None else 2
            chunk = CHUNK * out * FLOAT
            logits = (LOGITS_KEPT if chunk <= LARGEST else LOGITS) * chunk
            found.append(Phase("probe", (heads * out * columns + 2 * PROBE_TOKENS * columns) * FLOAT + logits))
        return found

    # ---- time --------------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """How long the run takes here, the measurement of the machine aside."""
        machine = self.machine or Machine.measure(self.job.plan.compute)
        self.machine = machine
        source, copied = self.job.source, self.job.source.checkpoint.size_bytes * 8 / machine.copies
        blocks: dict[tuple[Any, ...], float] = {}
        total = (START_CALIBRATED if self.calibrated else START) + copied
        for i in range(source.n_blocks):
            stages = self._stages(i)
            key = tuple((s, r) for stage in stages for s, r in stage)
            if key not in blocks:
                blocks[key] = self._block(stages, machine)
            total += blocks[key]
        if self.calibrated:
            out, columns = source.head_shape
            total += 2 * 2 * PROBE_TOKENS * out * columns / machine.products * BEYOND
        return total

    def _block(self, stages: Sequence[Any], machine: Machine) -> float:
        solved = sum(self._law(r)(*s) for stage in stages for s, r in stage if r is not None)
        if not self.calibrated:
            return solved
        linear = sum(_numel(s) for stage in stages for s, _ in stage)
        length = self.job.plan.calibration.seq_len
        per_token = 2 * linear + 4 * length * self.width
        passes = 1.0 if self.waiting else 1 + len(stages) / 2
        observed = sum(stage[0][0][1] ** 2 for stage in stages if stage)
        transforms = self.job.plan.transforms
        forward = per_token * self.tokens * (passes + bool(transforms)) + per_token * 2 * PROBE_TOKENS
        gram = observed * self.tokens * (1 + bool(transforms))
        if (tune := self.job.plan.tune) is not None:
            forward += per_token * (3 * tune.steps * tune.rows * length + 4 * self.tokens)
        return solved + BEYOND * forward / machine.products + gram / machine.grams + self._transformed(stages)

    def _transformed(self, stages: Sequence[Any]) -> float:
        found = 0.0
        for t in self.job.plan.transforms:
            for stage in stages:
                recipe = next((r for _, r in stage if r is not None), None)
                if recipe is not None:
                    key = (t, recipe)
                    if key not in self._laws:
                        self._laws[key] = transforming(t, recipe)
                    rows = min(sum(s[0] for s, _ in stage), getattr(t, "rows", 1 << 30))
                    found += self._laws[key](rows, stage[0][0][1])
        return found

    def _law(self, recipe: Recipe) -> Law:
        if recipe not in self._laws:
            self._laws[recipe] = solving(recipe)
        return self._laws[recipe]

    def _different(self) -> list[int]:
        """Blocks that are not like an earlier one."""
        source, seen, found = self.job.source, set(), []
        for i in range(source.n_blocks):
            key = tuple((n, tuple(p.shape)) for n, p in source.skeleton(i).named_parameters())
            if key not in seen:
                seen.add(key)
                found.append(i)
        return found


def _shape(block: nn.Module, name: str) -> tuple[int, int]:
    out, columns = get_weight(block.get_submodule(name)).shape
    return int(out), int(columns)


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _parameters(block: nn.Module) -> int:
    return sum(_numel(p.shape) for p in block.parameters())


def _batch(model: Model) -> int:
    """Tokens of one batch."""
    length = model.job.plan.calibration.seq_len
    return max(1, TOKENS_PER_BATCH // length) * length
