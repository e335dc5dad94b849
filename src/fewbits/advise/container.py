"""The files of a checkpoint: every header against its file, every shard against the index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from fewbits import storage
from fewbits.advise.finding import Finding
from fewbits.errors import CheckpointError, FewbitsError

INDEX = "model.safetensors.index.json"
_QUOTED = re.compile(r"tensor '([^']+)'|'([^']+)' appears twice")


def check_files(path: Path) -> list[Finding]:
    """What is wrong with the safetensors files of a directory, or with one file."""
    if path.is_file():
        return list(_headers({path: set()}, listed=False))
    index, single = path / INDEX, path / "model.safetensors"
    if single.is_file() or not index.is_file():
        files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
        found = list(_headers({f: set() for f in files}, listed=False))
        return found or list(_openable(path))
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str]] = {}
        for name, shard in table.items():
            shards.setdefault(path / shard, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        return [Finding("index", INDEX, "it is no table of tensors and their files; download it again")]
    found = list(_headers(shards, listed=True))
    for extra in sorted(set(path.glob("*.safetensors")) - set(shards)):
        found.append(Finding("unlisted file", extra.name, f"no tensor of {INDEX} lies in it, so no reader opens it"))
    return found or list(_openable(path))


def _headers(shards: dict[Path, set[str]], listed: bool) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for file, wanted in sorted(shards.items()):
        if not file.is_file():
            some = min(wanted, default=file.name)
            yield Finding("missing shard", some, f"{file.name} is not there, and with it {len(wanted)} tensors")
            continue
        try:
            names = [s.name for s in storage.read_header(file)]
        except CheckpointError as e:
            found = _QUOTED.search(str(e))
            yield Finding("file", (found[1] or found[2]) if found else file.name, str(e))
            continue
        for name in names:
            if name in seen:
                yield Finding("duplicate tensor", name, f"it is in {seen[name]} and in {file.name}")
            elif listed and name not in wanted and not any(name in w for w in shards.values()):
                yield Finding("unlisted tensor", name, f"it is in {file.name}, but not in {INDEX}")
            seen.setdefault(name, file.name)
        for name in sorted(wanted - set(names)):
            yield Finding("missing tensor", name, f"{INDEX} says it is in {file.name}, which does not have it")


def _openable(path: Path) -> Iterator[Finding]:
    """Whatever else keeps the directory from being opened."""
    try:
        storage.Checkpoint.open(path)
    except FewbitsError as e:
        yield Finding("file", path.name, str(e))
