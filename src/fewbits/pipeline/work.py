"""The work directory: finished shards, plan and events beside the output, which appears by one rename.

``OUT.partial/`` holds ``plan.yaml``, ``run.json`` (what the shards depend on), ``events.jsonl`` and one file per
finished part. A part exists under its name only when it is complete, so to resume is to look which parts exist.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbits import storage
from fewbits.errors import RequestError


class WorkDir:
    """One run's directory. Opening checks the output and takes a lock; only one run at a time may work on an output."""

    def __init__(self, out: Path, resume: bool, overwrite: bool):
        self.out, self.path = out, out.with_name(out.name + ".partial")
        self.overwrite = overwrite
        if out.exists() and not overwrite:
            raise RequestError(f"{out} exists; choose another output, or give --overwrite to replace it")
        if out.parent.exists() and not out.parent.is_dir():
            raise RequestError(f"{out.parent} is a file, not a directory; choose another output")
        if self.path.exists() and not resume and not overwrite:
            raise RequestError(f"{self.path} holds an unfinished run; --resume continues it, --overwrite starts again")
        self.resume = resume and self.path.exists()

    def start(self, identity: Mapping[str, Any], plan: str) -> None:
        """Create or take over the directory. Raises RequestError when the unfinished run was another one."""
        if self.path.exists() and not self.resume:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")  # noqa: SIM115 - held for the whole run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(
                f"another process is working in {self.path}; wait for it or choose another output"
            ) from None
        known = self.path / "run.json"
        if self.resume and known.exists():
            before = json.loads(known.read_text())
            changed = sorted(k for k in identity if before.get(k) != identity[k])
            if changed:
                raise RequestError(
                    f"the unfinished run in {self.path} differs in {', '.join(changed)}; "
                    "repeat its options, or --overwrite"
                )
        (self.path / "plan.yaml").write_text(plan)
        _replace(known, json.dumps(dict(identity), indent=1, sort_keys=True))

    def part(self, name: str) -> Path:
        """Path of a finished part."""
        return self.path / f"{name}.safetensors"

    def done(self, name: str) -> bool:
        """Whether a part is finished."""
        return self.part(name).exists()

    def write(self, name: str, tensors: Mapping[str, Tensor], event: Iterable[Mapping[str, Any]]) -> None:
        """Finish a part: its events first, then its tensors, each by a rename."""
        lines = "".join(json.dumps(dict(e), sort_keys=True) + "\n" for e in event)
        _replace(self.path / f"{name}.jsonl", lines)
        storage.save(self.part(name), tensors)

    def events(self, names: Iterable[str]) -> str:
        """Lines of all finished parts' events, in order."""
        return "".join((self.path / f"{n}.jsonl").read_text() for n in names)

    def publish(
        self,
        parts: Iterable[str],
        files: Mapping[str, str],
        copies: Iterable[Path],
        assemble: Callable[[list[Path], Path], object] = storage.merge,
    ) -> int:
        """Assemble the output beside the parts and rename it into place; returns its size in bytes.

        ``assemble(parts, directory)`` makes the files of the weights, by default safetensors.
        """
        final = self.path / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        for source in copies:
            shutil.copyfile(source, final / source.name)
        for name, text in files.items():
            (final / name).write_text(text)
        assemble([self.part(p) for p in parts], final)
        for f in sorted(final.iterdir()):
            with open(f, "rb") as handle:
                os.fsync(handle.fileno())
        size = sum(f.stat().st_size for f in final.iterdir())
        if self.out.exists():
            old = self.path / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        final.rename(self.out)
        shutil.rmtree(self.path)
        return size

    def discard(self) -> None:
        """Remove the directory: a request or a file was wrong, there is nothing to come back to."""
        shutil.rmtree(self.path, ignore_errors=True)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)
