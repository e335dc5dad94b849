"""The events that a run leaves in its checkpoint, one JSON object per line, as data for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError, RequestError

Event = dict[str, Any]
FILE = "fewbits_events.jsonl"
WORST = 5


def read(folder: str | Path) -> list[Event]:
    """Events of the checkpoint in ``folder``: one per quantized tensor, in the order of the walk.

    Raises RequestError when it has none, CheckpointError when the file is damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise RequestError(f"{folder} has no {FILE}; give a checkpoint that `fewbits quantize` wrote")
    return parse(file.read_text(encoding="utf-8"), file)


def parse(lines: str, file: Path) -> list[Event]:
    """One event per line; CheckpointError names the first line that is none."""
    found = []
    for n, line in enumerate(lines.splitlines(), 1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise CheckpointError(f"{file}: line {n} is not an event; quantize again")
        found.append(event)
    return found


def tensors(events: Iterable[Event]) -> list[Event]:
    """Events of quantized weights."""
    return [e for e in events if e.get("event") == "tensor" and "error" in e]


def worst(events: Iterable[Event], count: int = WORST) -> list[Event]:
    """The ``count`` weights with the largest relative output error, largest first: name, error, bits per weight.

    Where nothing was calibrated the error is that of the weights themselves, all inputs counted alike.
    """
    ordered: Sequence[Event] = sorted(tensors(events), key=lambda e: (-e["error"], e["name"]))
    return [{k: e.get(k) for k in ("name", "error", "bits_per_weight")} for e in ordered[:count]]
