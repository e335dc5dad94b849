"""A comparison on disk: what it is about, one file per finished cell, one line per event.

``compare.json`` says what every figure depends on; ``cells/NAME.json`` grows step by step, each by a rename, so that a
comparison that was killed goes on where it stopped; ``cells/NAME/`` is the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError, RequestError

IDENTITY, EVENTS = "compare.json", "timeline.jsonl"


class Folder:
    """The directory of one comparison. Opening it raises RequestError when it holds another one."""

    def __init__(self, path: Path, identity: Mapping[str, Any], overwrite: bool = False):
        self.path = path
        known = path / IDENTITY
        if path.exists() and not known.exists() and any(path.iterdir()):
            raise RequestError(f"{path} exists and holds no comparison; choose another --out")
        if overwrite and path.exists():
            shutil.rmtree(path)
        (path / "cells").mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(dict(identity)))
        if known.exists():
            before = read(known)["identity"]
            changed = sorted(k for k in wanted if before.get(k) != wanted[k])
            if changed:
                raise RequestError(
                    f"the comparison in {path} differs in {', '.join(changed)}; repeat its options, choose another "
                    "--out, or give --overwrite to start again"
                )
        else:
            write(known, {"identity": wanted})
        self.began = time.perf_counter()
        self.run = 1 + max((int(e.get("run", 0)) for e in self.events()), default=0)

    def cell(self, name: str) -> dict[str, Any]:
        """What is known of a cell so far; empty for a new one."""
        file = self._file(name)
        return read(file) if file.exists() else {}

    def update(self, name: str, **facts: Any) -> dict[str, Any]:
        """Add facts to a cell."""
        found = self.cell(name) | facts
        write(self._file(name), found)
        return found

    def checkpoint(self, name: str) -> Path:
        """Where a cell's model is."""
        return self.path / "cells" / name

    def discard(self, name: str) -> None:
        """Remove a cell's model; its figures, plan and events stay."""
        shutil.rmtree(self.checkpoint(name), ignore_errors=True)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Append an event with the time since this run began."""
        line = {"run": self.run, "t": round(time.perf_counter() - self.began, 3)} | dict(event)
        with open(self.path / EVENTS, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All events so far; a line that was cut off by a kill is left out."""
        file = self.path / EVENTS
        found = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def _file(self, name: str) -> Path:
        return self.path / "cells" / f"{name}.json"


def read(file: Path) -> dict[str, Any]:
    """Raises CheckpointError for a file that is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged; remove it, and it is made again")
    return found


def write(file: Path, data: Mapping[str, Any]) -> None:
    """By a rename: complete or not at all."""
    temporary = file.with_name(file.name + ".new")
    temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    os.replace(temporary, file)
