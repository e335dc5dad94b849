"""Names on disk and names in memory.

Transformers converts some checkpoints while loading (renamed modules, experts stacked in one tensor, a missing or extra
prefix). What is written keeps the names on disk, one matrix per expert, because that is what servers load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewbits.storage import Checkpoint

STACKED = re.compile(r"(?P<path>.*\.experts)\.(?P<part>gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives: tensor ``stored`` of the checkpoint, or a part of it, written back as ``disk``."""

    disk: str
    stored: str
    expert: int | None = None
    half: int | None = None

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The read-only view into the file."""
        t = checkpoint.tensor(self.stored)
        if self.expert is not None:
            t = t[self.expert]
        return t if self.half is None else t.chunk(2)[self.half]

    def shape(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Shape of what :meth:`read` returns, from the header alone."""
        shape = checkpoint.shape(self.stored)
        if self.expert is not None:
            shape = shape[1:]
        return shape if self.half is None else (shape[0] // 2, *shape[1:])


def match(
    checkpoint: Checkpoint,
    wanted: Mapping[str, Sequence[int]],
    prefix: str,
    pairs: Sequence[tuple[str, str]],
    rename: Callable[[str], str],
) -> tuple[dict[str, Slot], list[str]]:
    """Slots by name in memory, and the checkpoint's names that nothing in memory corresponds to.

    ``wanted`` are the names in memory, ``prefix`` the base model's prefix that checkpoints carry or lack, ``pairs`` the
    family's (disk, memory) parts of names, ``rename`` transformers' own renaming.
    """
    slots: dict[str, Slot] = {}
    rest: list[str] = []
    for name in checkpoint.names():
        found = _find(name, wanted, prefix, pairs, rename)
        slots.update(found)
        if not found:
            rest.append(name)
    return slots, rest


def _find(
    name: str,
    wanted: Mapping[str, Sequence[int]],
    prefix: str,
    pairs: Sequence[tuple[str, str]],
    rename: Callable[[str], str],
) -> dict[str, Slot]:
    for candidate in _candidates(name, prefix, pairs, rename):
        if candidate in wanted:
            return {candidate: Slot(name, name)}
        stacked = STACKED.match(candidate)
        if stacked and f"{stacked['path']}.0.down_proj.weight" in wanted:
            return _unstacked(name, stacked["path"], stacked["part"], wanted, pairs)
    return {}


def _candidates(name: str, prefix: str, pairs: Sequence[tuple[str, str]], rename: Callable[[str], str]) -> list[str]:
    table = name
    for disk, memory in pairs:
        table = table.replace(disk, memory)
    names = [name, table, rename(name)]
    return names + [n.removeprefix(f"{prefix}.") for n in names] + [f"{prefix}.{n}" for n in names]


def _unstacked(
    name: str, path: str, part: str, wanted: Mapping[str, Sequence[int]], pairs: Sequence[tuple[str, str]]
) -> dict[str, Slot]:
    projections = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    slots, e = {}, 0
    while f"{path}.{e}.down_proj.weight" in wanted:
        for half, projection in enumerate(projections):
            memory = f"{path}.{e}.{projection}.weight"
            disk = memory
            for on_disk, in_memory in reversed(pairs):
                disk = disk.replace(in_memory, on_disk)
            slots[memory] = Slot(disk, name, e, half if len(projections) == 2 else None)
        e += 1
    return slots
