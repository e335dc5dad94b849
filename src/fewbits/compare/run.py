"""The steps of a comparison: check every cell, quantize, score, time; each kept as soon as it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fewbits import api
from fewbits.compare import figures
from fewbits.compare.cell import Cell, fitting
from fewbits.compare.folder import IDENTITY, Folder, read
from fewbits.errors import RequestError
from fewbits.evaluate import distribution
from fewbits.evaluate import text as texts
from fewbits.evaluate.against import Reference, Settings
from fewbits.evaluate.api import float_type, summary
from fewbits.evaluate.census import census
from fewbits.evaluate.speed import bench, resident
from fewbits.model import Source
from fewbits.pipeline.job import Job
from fewbits.pipeline.together import alike, together
from fewbits.pipeline.walk import entries_of

Event = dict[str, Any]
REFERENCE = "original"
"""Name of the file with the reference's own figures; no method is called so."""


@dataclass(frozen=True)
class Setting:
    """What every cell has in common; all of it but ``speed`` and ``discard`` decides figures.

    ``text`` and ``domains`` (name -> text) are what is scored, ``windows`` windows of ``ctx`` tokens of each;
    ``stream`` is where calibrated cells take their inputs from (:class:`fewbits.Plan`); ``speed`` are the arguments of
    :func:`fewbits.evaluate.speed.bench`, None to time nothing; ``discard`` removes a checkpoint once it is measured.
    """

    text: str = "wikitext2"
    domains: Mapping[str, str] = field(default_factory=dict)
    ctx: int = 2048
    windows: int = 20
    calibration: str = "c4"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    stream: str = "original"
    compute: str | None = None
    dtype: str | None = None
    speed: Mapping[str, Any] | None = field(default_factory=lambda: {"batches": [1]})
    discard: bool = False

    @property
    def texts(self) -> dict[str, str]:
        """Every text by name, the main one first."""
        return {"text": self.text} | dict(self.domains)


class Comparison:
    """``cells`` made from the model ``src`` under ``out``; ``tell`` gets every event."""

    def __init__(
        self,
        src: str,
        out: Path,
        cells: Sequence[Cell],
        setting: Setting,
        tell: Callable[[Event], None] = lambda event: None,
        overwrite: bool = False,
    ):
        self.src, self.setting, self._tell = src, setting, tell
        if "text" in setting.domains:
            raise RequestError("--domains names a text 'text', which is what --text is called; choose another name")
        self.contents = {name: texts.read(t) for name, t in setting.texts.items()}
        self.cells = self._fitting(cells)  # nothing is written for a model that cannot be read
        identity = {"source": str(src)} | {k: v for k, v in asdict(setting).items() if k not in ("speed", "discard")}
        self.identity = identity
        self.folder = Folder(out, identity, overwrite)
        self._quiet: set[str] = set()
        self._title: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Carry it out, or what is left of it; everything that is known afterwards, as JSON types."""
        pending = self._check()
        self._quantize(pending)
        self._score()
        self._time()
        self._look()
        return self.found()

    def found(self) -> dict[str, Any]:
        """What is known so far."""
        return gathered(self.folder, self.identity, [c.name for c in self.cells])

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _check(self) -> dict[str, Job]:
        """Jobs of the cells that are not quantized yet; what a layout or a method refuses is noted and left out."""
        jobs: dict[str, Job] = {}
        s = self.setting
        for cell in self.cells:
            known = self.folder.cell(cell.name)
            if "quantize" in known and known["group_size"] != cell.group_size:
                raise RequestError(
                    f"{cell.name} in {self.folder.path} has groups of {known['group_size']}, {cell.group_size} is "
                    "asked for; choose another --out, or give --overwrite to start again"
                )
            if "quantize" in known:
                continue
            how = {"calibration": s.calibration, "samples": s.samples, "seq_len": s.seq_len, "seed": s.seed}
            emit = self._emitter(cell.name)
            try:
                jobs[cell.name] = self._job(cell, how | {"compute": s.compute, "on_event": emit})
            except RequestError as e:
                self._tell({"event": "note", "message": f"{cell.name} is left out: {e}"})
                self.folder.update(cell.name, **asdict(cell), refused=str(e))
        if self.cells and all(self.folder.cell(c.name).get("refused") for c in self.cells):
            raise RequestError(f"no cell can be made: {self.folder.cell(self.cells[0].name)['refused']}")
        return jobs

    def _fitting(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells with groups that divide the model's widths, and a note where that is not the method's own."""
        columns = sorted({e.shape[1] for e in entries_of(Source.open(self.src))})
        found = [fitting(c, columns) for c in cells]
        for size in sorted({b.group_size for a, b in zip(cells, found, strict=True) if a != b and b.group_size}):
            names = [b.name for a, b in zip(cells, found, strict=True) if a != b and b.group_size == size]
            message = f"groups of {size} for {', '.join(names)}: their own do not divide widths of {columns}"
            self._tell({"event": "note", "message": message})
        return found

    def _job(self, cell: Cell, how: Mapping[str, Any]) -> Job:
        job = api.quantize(self.src, self.folder.checkpoint(cell.name), **cell.options(), **how, dry_run=True)
        assert isinstance(job, Job)
        if self.setting.stream == job.plan.stream:
            return job
        if (why := job.plan.bound_to_quantized) is not None:
            self._tell({"event": "note", "message": f"{cell.name} is calibrated on the quantized stream: {why}"})
            return job
        return replace(job, plan=replace(job.plan, stream=self.setting.stream))

    def _emitter(self, name: str) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            if event.get("event") in ("block", "done"):
                facts = {k: event[k] for k in ("event", "block", "seconds", "error") if k in event}
                self.folder.tell(facts | {"cell": name, "rss": resident()})
            if name not in self._quiet:  # lanes go block by block together: one voice is enough
                self._tell(event | {"which": self._title.get(name, name)})

        return emit

    def _quantize(self, jobs: Mapping[str, Job]) -> None:
        """Cells that see the same inputs in one walk, the others one after another."""
        finished = {n for n in jobs if self.folder.checkpoint(n).exists()}  # killed between the output and its figures
        for name in finished:
            self.folder.update(name, **self._facts(name), quantize=self._published(name, jobs[name]))
        calibrated = [n for n, j in jobs.items() if n not in finished and j.rows is not None]
        first = next((n for n in calibrated if jobs[n].plan.stream == "original"), None)
        group = [n for n in calibrated if first is not None and alike(jobs[first], jobs[n])]
        if group:
            outs = [self.folder.checkpoint(n) for n in group]
            self._quiet, self._title = set(group[:-1]), {group[-1]: f"{len(group)} from one pass"}
            results, shared = together([jobs[n] for n in group], outs, resume=True)
            own = {n: r.seconds - shared for n, r in zip(group, results, strict=True)}
            self.folder.tell({"event": "shared", "seconds": shared, "cells": own})
            for n, result in zip(group, results, strict=True):
                self.folder.update(n, **self._facts(n), quantize=result.to_json() | {"own_seconds": own[n]})
        for n, job in jobs.items():
            if n not in finished and n not in group:
                result = job.run(self.folder.checkpoint(n), resume=True)
                self.folder.update(n, **self._facts(n), quantize=result.to_json())

    def _facts(self, name: str) -> dict[str, Any]:
        """The cell, its recipe and its tensors: what stays when the checkpoint is removed."""
        cell = next(c for c in self.cells if c.name == name)
        folder = self.folder.checkpoint(name)
        events = (folder / "fewbits_events.jsonl").read_text(encoding="utf-8").splitlines()
        plan = (folder / "fewbits_plan.yaml").read_text(encoding="utf-8")
        return asdict(cell) | {"plan": plan, "tensors": [json.loads(e) for e in events], "refused": None}

    def _published(self, name: str, job: Job) -> dict[str, Any]:
        """What is known of an output whose run was killed before it could say how long it took."""
        facts = census(self.folder.checkpoint(name))
        return {
            "out": facts.path,
            "method": job.plan.method,
            "format": facts.format,
            "bits_per_weight": facts.bits_per_weight,
            "size_bytes": facts.size_bytes,
        }

    def _todo(self, what: str) -> list[str]:
        known = {c.name: self.folder.cell(c.name) for c in self.cells}
        return [n for n, k in known.items() if k.get("quantize") and what not in k]

    def _score(self) -> None:
        """The reference once, then every cell that has no scores yet."""
        todo = self._todo("eval")
        if not todo and "eval" in self.folder.cell(REFERENCE):
            return
        s = self.setting
        settings = Settings(s.ctx, s.windows, dtype=float_type(s.dtype), tell=self._tell)
        with Reference(self.src, self.contents, settings) as reference:
            if "eval" not in self.folder.cell(REFERENCE):
                facts = census(self.src) if Path(self.src).exists() else None
                own: dict[str, Any] = {
                    "size_bytes": facts and facts.size_bytes,
                    "bits_per_weight": facts and facts.bits_per_weight,
                    "format": "dense",
                }
                began = time.perf_counter()
                own["eval"] = self._summaries(self.src, reference.losses(), began)
                self.folder.update(REFERENCE, **own)
            for name in todo:
                self.folder.tell({"event": "score", "cell": name, "rss": resident()})
                began = time.perf_counter()
                scores = reference.compare(self.folder.checkpoint(name), title=name)
                found = self._summaries(str(self.folder.checkpoint(name)), scores, began)
                main = scores["text"]
                self.folder.update(
                    name,
                    eval=found,
                    histogram=figures.histogram(main[2]),
                    worst_tokens=figures.worst(main, reference.ids["text"], reference.tokenizer),
                )

    def _summaries(self, model: str, scores: Mapping[str, Any], began: float) -> dict[str, Any]:
        """The JSON of ``fewbits eval`` for each text; ``seconds`` are those of all texts."""
        s = self.setting
        facts = {"model": model, "reference": self.src, "ctx": s.ctx, "windows": s.windows}
        facts["seconds"] = time.perf_counter() - began
        return {n: summary(x, facts | {"text": s.texts[n]}).to_json() for n, x in scores.items()}

    def _look(self) -> None:
        """How weights and inputs of the original are distributed, for the page."""
        if "distribution" not in self.folder.cell(REFERENCE):
            rows = min(2, self.setting.samples)
            found = distribution.study(self.src, self.setting.calibration, rows, self.setting.seq_len, self._tell)
            self.folder.update(REFERENCE, distribution=found)

    def _time(self) -> None:
        """Every model in a process of its own, one after another, the original first."""
        if self.setting.speed is not None:
            how = dict(self.setting.speed)
            todo = {REFERENCE: self.src} if "speed" not in self.folder.cell(REFERENCE) else {}
            todo |= {n: str(self.folder.checkpoint(n)) for n in self._todo("speed")}
            for k, (name, path) in enumerate(todo.items(), 1):
                self.folder.update(name, speed=bench(path, **how))
                self._tell({"event": "window", "which": "timing", "window": k, "windows": len(todo)})
        if self.setting.discard:
            for cell in self.cells:
                self.folder.discard(cell.name)


def known(path: Path) -> dict[str, Any]:
    """What :meth:`Comparison.run` returned, or would by now, of the comparison in ``path``: every cell it holds."""
    identity = read(path / IDENTITY)["identity"]
    names = sorted(f.stem for f in (path / "cells").glob("*.json") if f.stem != REFERENCE)
    return gathered(Folder(path, identity), identity, names)


def gathered(folder: Folder, identity: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Figures of the cells ``names`` and of the reference, events and what they were measured on, as JSON types."""
    events, reference = folder.events(), folder.cell(REFERENCE)
    return {
        "source": identity["source"],
        "main": "text",
        "texts": {"text": identity["text"]} | dict(identity["domains"]),
        "identity": dict(identity),
        "reference": reference,
        "cells": [{"name": n} | folder.cell(n) for n in names],
        "shared": next((e for e in reversed(events) if e.get("event") == "shared"), None),
        "events": events,
        "distribution": reference.get("distribution"),
    }
