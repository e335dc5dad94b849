"""One run from a source to a finished checkpoint: check everything first, walk the blocks, publish by one rename."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbits import formats, storage
from fewbits.errors import FewbitsError, RequestError
from fewbits.formats import Entry, Layout
from fewbits.model import Source
from fewbits.pipeline.acts import Acts, pairing
from fewbits.pipeline.card import card
from fewbits.pipeline.fisher import Fisher
from fewbits.pipeline.lane import Emit, Lane, part, share
from fewbits.pipeline.memory import keep_freed_memory
from fewbits.pipeline.probe import Probe
from fewbits.pipeline.walk import DTYPES, Walk, entries_of
from fewbits.pipeline.work import WorkDir
from fewbits.plan import Plan, Recipe

HEAD = "head"
"""Name of the part that holds a quantized output head."""
HEAD_FORMATS = ("fewbits", "gptq", "compressed-tensors")


@dataclass(frozen=True)
class Result:
    """What a run produced. ``kl`` is the probe's mean KL divergence, None when nothing was calibrated."""

    out: str
    method: str
    format: str
    bits_per_weight: float
    size_bytes: int
    seconds: float
    peak_rss_bytes: int
    tensors: int
    kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys of ``fewbits quantize --json``."""
        return asdict(self)


@dataclass
class Job:
    """A checked request: source, plan and layout fit each other. ``rows`` int64 ``[samples, tokens]`` when calibrated.

    ``held_out`` are rows of the same text that the walk does not learn from.
    """

    source: Source
    plan: Plan
    recipes: Mapping[str, Recipe | None]
    layout: Layout
    rows: Tensor | None
    held_out: Tensor | None
    max_memory: int | None = None
    emit: Emit = lambda event: None

    @classmethod
    def check(cls, source: Source, plan: Plan, **rest: Any) -> Job:
        """Raises Refused or RequestError before any work when the plan cannot be carried out or stored."""
        names = [e.name for e in entries_of(source)] + _head(source, plan)
        recipes = plan.assign(names)
        entries = entries_of(source, recipes)
        for e in entries:
            if (recipe := recipes[e.name]) is not None and (reason := recipe.refusal(e.shape)):
                raise RequestError(f"{e.name}: {reason}")
            if recipe is not None and "cross" in recipe.needs and ".experts." in e.name:
                raise RequestError(
                    f"{e.name}: routed experts see other tokens than in the original model, so GPTAQ has no pairs to "
                    "learn from; use --method gptq, or a rule for them"
                )
        if (head := recipes.get(source.head_name)) is not None and "fisher" in head.needs:
            raise RequestError(f"{source.head_name} is outside the blocks: SqueezeLLM has no gradients for it; use rtn")
        layout = formats.writer(plan.format, entries, plan.dtype)
        return cls(source, plan, recipes, layout, **rest)

    @property
    def entries(self) -> list[Entry]:
        """Every linear weight with its grid."""
        return entries_of(self.source, self.recipes)

    def run(self, out: Path, resume: bool = False, overwrite: bool = False) -> Result:
        """Carry out the plan. Whatever goes wrong, nothing is left under ``out``; only an interruption can be
        resumed.
        """
        started = time.perf_counter()
        work = self.begin(out, resume, overwrite)
        with cleaned(work):
            acts, waiting = self.acts(work.path)
            lane = self.lane(work, self.rows is not None, waiting)
            if acts is not None and self.plan.stream == "original":
                share([lane], acts)
            else:
                self._blocks(lane, acts)
            return self.finish(lane, acts, lambda: time.perf_counter() - started)

    def begin(self, out: Path, resume: bool = False, overwrite: bool = False) -> WorkDir:
        """The work directory, once everything that can be known to go wrong has been looked at."""
        if self.rows is None and check_calibrated(self.plan):
            raise RequestError("this plan needs calibration and was checked without a text; name one with calibration")
        if self.rows is not None:
            keep_freed_memory()
        work = WorkDir(out, resume, overwrite)
        self._room(out.parent)
        work.start(self._identity(), self.plan.to_yaml())
        n, tensors = self.source.n_blocks, sum(r is not None for r in self.recipes.values())
        self.emit({"event": "start", "blocks": n, "tensors": tensors})
        for warning in formats.warnings(self.plan.format, self.entries):
            self.emit({"event": "note", "message": warning})
        return work

    def lane(self, work: WorkDir, calibrated: bool, waiting: bool) -> Lane:
        """This job as one of the results of a walk."""
        walk = Walk(self.source, self.plan, self.recipes, self.layout, waiting, self._fisher(work), self.emit)
        probe = Probe.start(walk, self.held_out) if self.held_out is not None and calibrated else None
        return Lane(walk, work, probe, self.emit)

    def finish(self, lane: Lane, acts: Acts | None, seconds: Callable[[], float]) -> Result:
        """Everything after the last block, and the output under its name. ``seconds()`` is what it took."""
        work = lane.work
        head = self._quantize_head(work, lane.walk, acts) if self.recipes.get(self.source.head_name) else None
        kl = lane.probe.finish(head) if lane.probe else None
        parts = self._outside(work)
        events = work.events([p for p in parts if not p.startswith("outside-")])
        bpw = bits_per_weight(events)
        files = self._files(bpw, kl, events)
        assemble = getattr(self.layout, "assemble", storage.merge)
        size = work.publish(parts, files, self.source.copy_files(), assemble)
        quantized = sum(r is not None for r in self.recipes.values())
        result = Result(
            str(work.out),
            self.plan.method,
            self.plan.format,
            bpw,
            size,
            seconds(),
            peak_rss(),
            quantized,
            kl["kl_mean"] if kl else None,
        )
        self.emit({"event": "done"} | result.to_json())
        return result

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _blocks(self, lane: Lane, acts: Acts | None) -> None:
        """Every block on the outputs of the quantized blocks before it."""
        walk, probe = lane.walk, lane.probe
        for i in range(self.source.n_blocks):
            began = time.perf_counter()
            if lane.done(i):
                self._replay(lane, i, acts)
                lane.skipped(i)
                continue
            if probe:
                probe.original(i)
            block = walk.quantize(i, acts)
            lane.store(i, block)
            if probe:
                probe.quantized(i, block.tensors)
            lane.tell(i, block, time.perf_counter() - began)

    def _quantize_head(self, work: WorkDir, walk: Walk, acts: Acts | None) -> Tensor:
        """Quantize the output head unless that is done; its weight as it was written."""
        if not work.done(HEAD):
            made = walk.head(acts)
            work.write(HEAD, made.tensors, made.events)
            for event in made.events:
                self.emit(event)
        stored = storage.Checkpoint.open(work.part(HEAD))
        return walk.stored_head({k: stored.tensor(k) for k in stored.names()})

    def _replay(self, lane: Lane, i: int, acts: Acts | None) -> None:
        if acts is None and lane.probe is None:
            return
        tensors = lane.stored(i)
        if lane.probe:
            lane.probe.original(i)
        if acts is not None:
            lane.walk.replay(i, acts, tensors)
        if lane.probe:
            lane.probe.quantized(i, tensors)

    def acts(self, folder: Path) -> tuple[Acts | None, bool]:
        """The activation store, spilled into ``folder``, and whether all batches may wait inside a block at once."""
        if self.rows is None or (self.plan.stream == "quantized" and not self.plan.needs - {"fisher"}):
            return None, True
        rows, tokens = self.rows.shape
        width = int(self.source.text_config.hidden_size)
        budget = None if self.max_memory is None else self.max_memory // 4
        acts = Acts(rows, tokens, width, budget, folder)
        widest = max(e.shape[1] for e in self.entries)
        if self.plan.needs & {"cross", "outputs"}:
            every = 1 if self.plan.tune else pairing(rows * tokens, widest)
            acts.pair(every, budget, folder)
        for b, ids in acts.batches(self.rows):
            acts[b] = self.source.embed(ids)
            if acts.original is not None and (at := acts.partner(b)) is not None:
                acts.original[at] = acts[b]
        all_rows = rows + (0 if acts.original is None else acts.original.rows)
        inside = all_rows * tokens * (2 * width + widest) * 4
        waiting = self.max_memory is None or inside <= self.max_memory // 2
        if acts.spilled:
            self.emit({"event": "note", "message": f"activations ({acts.nbytes / 2**30:.1f} GiB) are kept on disk"})
        if not waiting:
            self.emit(
                {"event": "note", "message": "memory is short: each block runs once per stage (slower, same result)"}
            )
        return acts, waiting

    def _fisher(self, work: WorkDir) -> Fisher | None:
        """The Fisher information of the weights whose recipe reads it; None when none does."""
        if "fisher" not in self.plan.needs or self.rows is None:
            return None
        wanted = {name for name, r in self.recipes.items() if r is not None and "fisher" in r.needs}
        locals_ = [
            [n for n in self.source.linears(self.source.skeleton(i)) if self.source.disk_name(i, n) in wanted]
            for i in range(self.source.n_blocks)
        ]
        found = Fisher(self.source, locals_, work.path)
        found.gather(self.rows, self.plan.compute, lambda n, of: self.emit({"event": "fisher", "rows": n, "of": of}))
        return found

    def _outside(self, work: WorkDir) -> list[str]:
        """Everything that belongs to no block, one part per tensor; floats in the dtype of the plan."""
        parts = [part(i) for i in range(self.source.n_blocks)]
        head = self.source.head_name
        if self.recipes.get(head):
            parts.append(HEAD)
        for k, name in enumerate(self.source.outside()):
            if name == f"{head}.weight" and HEAD in parts:
                continue
            own = f"outside-{k:05d}"
            if not work.done(own):
                work.write(own, self._stored(name), ())
                self.source.checkpoint.release()
            parts.append(own)
        return parts

    def _stored(self, name: str) -> dict[str, Tensor]:
        """A tensor outside the blocks, rounded when a rule of the plan says so."""
        t, module = self.source.checkpoint.tensor(name), name.removesuffix(".weight")
        rule = next((r for r in self.plan.outside if fnmatch.fnmatchcase(module, r.match)), None)
        if rule is not None and rule.recipe is not None:
            return self.layout.pack(module, rule.recipe.solver(t.float(), rule.recipe.grid, None))
        return {name: t.to(DTYPES[self.plan.dtype]) if t.is_floating_point() else t}

    def _files(self, bpw: float, kl: dict[str, float] | None, events: str) -> dict[str, str]:
        config = dict(self.source.raw_config)
        config.pop("torch_dtype", None)
        config["dtype"] = self.plan.dtype
        config["quantization_config"] = formats.with_cache(self.layout.config(self.entries), self.plan.kv_cache)
        return {
            "config.json": json.dumps(config, indent=2) + "\n",
            "README.md": card(self.source, self.plan, bpw, kl, events),
            "fewbits_plan.yaml": self.plan.to_yaml(),
            "fewbits_events.jsonl": events,
        } | self.layout.files(self.entries)

    def _identity(self) -> dict[str, Any]:
        """What the bytes of the parts depend on."""
        from fewbits import __version__

        headers = hashlib.sha256()
        for name in self.source.checkpoint.names():
            headers.update(
                f"{name} {self.source.checkpoint.shape(name)} {self.source.checkpoint.dtype(name)}\n".encode()
            )
        files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in self.source.checkpoint.files]
        return {
            "version": __version__,
            "plan": self.plan.digest(),
            "model": headers.hexdigest(),
            "files": files,
            "rows": None if self.rows is None else hashlib.sha256(self.rows.numpy().tobytes()).hexdigest(),
        }

    def _room(self, folder: Path) -> None:
        """Refuse when the disk cannot hold the parts and the output."""
        size = self.source.checkpoint.size_bytes
        while not folder.is_dir():
            folder = folder.parent
        stored = sum(math.prod(e.shape) * (e.grid.cost(e.shape) if e.grid else 16) / 8 for e in self.entries)
        outside = sum(self.source.checkpoint.nbytes(n) for n in self.source.outside())
        needed, free = 2 * int(min(size, stored + outside)), shutil.disk_usage(folder).free
        if needed > free:
            raise FewbitsError(
                f"disk full: {folder} has {free / 2**20:.0f} MiB free, this needs about {needed / 2**20:.0f} MiB"
            )


def bits_per_weight(events: str) -> float:
    """Over the quantized weights of a run, every parameter and every single weight beside the codes counted."""
    tensors = [e for e in map(json.loads, events.splitlines()) if e["event"] == "tensor"]
    total = sum(math.prod(e["shape"]) for e in tensors)
    return sum(math.prod(e["shape"]) * e["bits_per_weight"] for e in tensors) / total if total else 0.0


def _head(source: Source, plan: Plan) -> list[str]:
    """The output head, where a rule asks for it by its whole name: ``*`` alone leaves it in 16 bit."""
    if source.head_name not in {rule.match for rule in plan.rules}:
        return []
    if source.tied:
        raise RequestError(
            f"{source.head_name} is the embedding itself in this model (tied weights): a quantized copy beside it "
            "would make the checkpoint larger; leave it in 16 bit (drop --lm-head, or its rule)"
        )
    if plan.format not in HEAD_FORMATS:
        raise RequestError(
            f"format {plan.format!r} keeps {source.head_name} as it is; quantize it with {', '.join(HEAD_FORMATS)}"
        )
    return [source.head_name]


@contextmanager
def cleaned(work: WorkDir) -> Iterator[None]:
    """An error leaves nothing behind; an interruption leaves what ``resume`` needs."""
    try:
        yield
    except OSError as e:
        work.discard()
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FewbitsError(f"disk full while writing {work.path}; free some space and start again") from None
        raise
    except Exception:
        work.discard()
        raise


def peak_rss() -> int:
    """Largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_calibrated(plan: Plan) -> bool:
    """Whether the plan reads activations at all."""
    return bool(plan.needs)


__all__ = ["Job", "RequestError", "Result", "check_calibrated", "peak_rss"]
