"""``--log FILE``: when each step of a run was done and what the process held then, one JSON object per line.

It is a file of the user's own: an output directory has no times in it, else no two runs of a job could be equal.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

STEPS = ("start", "block", "note", "done")


def read(file: Path) -> list[dict[str, Any]]:
    """Lines of a log; one that a kill cut short, or that no log has, is left out."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and all(isinstance(event.get(k), int | float) for k in ("run", "t", "rss")):
            found.append(event)
    return found


class Log:
    """Call it with events; appends those of ``STEPS`` with ``t`` (seconds since this run began), ``rss`` (bytes) and
    the number of the run: a resumed job goes on in the same file. Nothing is written without a file.
    """

    def __init__(self, file: Path | None):
        self.file, self.began, self.run = file, time.perf_counter(), 1
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        if file is not None and file.exists():
            self.run += max((int(e["run"]) for e in read(file)), default=0)
            if not file.read_bytes().endswith(b"\n"):  # a line that was cut short: it gets an end
                with open(file, "ab") as f:
                    f.write(b"\n")

    def __call__(self, event: dict[str, Any]) -> None:
        if self.file is None or event.get("event") not in STEPS:
            return
        from fewbits.evaluate.speed import resident

        line = {"run": self.run, "t": round(time.perf_counter() - self.began, 3), "rss": resident()} | event
        with open(self.file, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
