"""``finetune``: a model and a file in, an adapter directory out."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError, RequestError
from fewbits.finetune import base, ranks
from fewbits.finetune.base import METHODS, Adapter, OnEvent, Qat, Result, Rows, Training
from fewbits.pipeline.job import peak_rss

REQUEST = "finetune.json"
SELF = "self"
FREE = ("save_steps", "keep_products")
"""Settings that may differ when a run goes on."""


def finetune(
    source: str | Path,
    out: str | Path,
    data: str | Path,
    *,
    method: str = "qlora",
    grid: str = "nf4-dq",
    base_method: str = "rtn",
    adapter: Adapter | None = None,
    rows: Rows | None = None,
    training: Training | None = None,
    qat: Qat | None = None,
    dtype: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> Result:
    """Train on few bits; the result is in directory ``out``.

    ``source`` is a transformers directory, a hub id or a GGUF file. "qlora" (arXiv 2305.14314) trains adapters, saved
    in peft's format, beside a frozen base: a dense model is rounded to ``grid`` first, into ``out/base``, to nearest or
    as ``base_method`` says ("gptq" learns from the training data); a quantized checkpoint is taken as it is. "lora"
    keeps a dense base dense. "qat" trains all weights of the linear layers as their quantized selves on ``grid`` and
    writes a checkpoint as ``qat`` says. ``data`` is a .jsonl, .parquet or text file, the name of a fetched text, or a
    data set of the hub as "hub:OWNER/NAME[@CONFIG][:SPLIT]"; for "qat" also "self", text that the model makes.
    ``dtype`` is what is computed in.

    ``out`` also gets ``log.jsonl`` (a line per step) and ``checkpoints``; ``resume`` goes on from the last whole one.
    Raises RequestError for requests and data that are wrong, FewbitsError, naming the step, for a loss that is not
    finite: what was good before it is kept.

    In several processes (torchrun, accelerate launch) each trains on rows of its own, ``training.batch`` at a time.
    """
    for package in ("accelerate",) if method == "qat" else ("peft", "accelerate"):
        base.require(package)
    if method not in METHODS:
        raise RequestError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}")
    if method != "qlora" and base_method != "rtn":
        raise RequestError(f"--base-method {base_method} rounds the base of qlora; {method} has none of few bits")
    if method == "qat" and adapter not in (None, Adapter()):
        raise RequestError("qat trains the weights themselves; options of adapters belong to qlora and lora")
    if method != "qat" and qat not in (None, Qat()):
        raise RequestError(f"{method} trains adapters; group size, format, distill and activations belong to qat")
    started = time.perf_counter()
    tell = on_event if on_event is not None and ranks.first() else lambda event: None
    run = _Run(str(source), Path(out), method, grid, base_method, dtype, tell)
    how = (adapter or Adapter(), rows or Rows(), training or Training(), qat or Qat())
    facts = run.carry_out(data, how, resume, overwrite)
    return Result(
        out=str(out), method=method, seconds=time.perf_counter() - started, peak_rss_bytes=peak_rss(), **facts
    )


@dataclass
class _Run:
    source: str
    out: Path
    method: str
    grid: str
    base_method: str
    dtype: str | None
    tell: OnEvent
    resume: bool = False

    def carry_out(
        self, data: str | Path, how: tuple[Adapter, Rows, Training, Qat], resume: bool, overwrite: bool
    ) -> dict[str, Any]:
        from fewbits.finetune import data as texts
        from fewbits.finetune.model import tokenizer_of

        adapter, rows, training, qat = how
        request: dict[str, Any] = {"source": _place(self.source), "data": str(data), "method": self.method}
        request |= {"grid": self.grid, "dtype": self.dtype, "rows": asdict(rows), "training": asdict(training)}
        request |= {"qat": asdict(qat)} if self.method == "qat" else {"adapter": asdict(adapter)}
        request |= {"base_method": self.base_method} if self.method == "qlora" else {}
        request = json.loads(json.dumps(request))
        self.resume = ranks.of_first(ranks.first() and _check(self.out, request, resume, overwrite))
        own = self.method == "qat" and str(data) == SELF
        found = [] if own else texts.read(data, tokenizer_of(self.source), rows)
        request["rows_sha256"] = _digest(found)
        if ranks.first():
            _start(self.out, request, self.resume)
        ranks.wait()
        try:
            if self.method == "qat":
                return self._qat(found, (rows, training, qat))
            return self._adapters(found, (adapter, rows, training))
        except RequestError:
            if not self.resume and ranks.first():
                shutil.rmtree(self.out, ignore_errors=True)
            raise

    def _adapters(self, found: Any, how: tuple[Adapter, Rows, Training]) -> dict[str, Any]:
        from fewbits.finetune import adapter as adapters
        from fewbits.finetune import model as bases
        from fewbits.finetune import train
        from fewbits.finetune.residual import fill
        from fewbits.model import Source

        adapter, rows, training = how
        if not ranks.first():
            ranks.wait()
        path = self.source
        if self.method == "qlora":
            path = bases.prepare(path, self.out, self.base_method, self.grid, found, self.tell)
        if ranks.first():
            ranks.wait()
        residual = adapter.init == "residual"
        if residual and path == self.source:
            raise RequestError(
                f"--init residual needs what rounding lost, and {self.source} is not rounded here; give a dense model "
                "and --method qlora"
            )
        model, tokenizer = bases.open_base(path, self.method, self.dtype)
        self._ready(model, rows, found)
        # An adapter that begins as the residual means nothing beside the original.
        tuned = adapters.attach(model, adapter, _place(path if residual else self.source), training.seed)
        if residual:
            share = fill(tuned, Source.open(self.source), found)
            self.tell({"event": "note", "message": f"adapters begin by taking back {share:.1%} of what rounding lost"})
        try:
            facts = train.train(tuned, found, training, self.out, _pad(tokenizer), self.resume, self.tell)
        except train.Diverged as e:
            raise FewbitsError(f"{e}; {_keep(tuned, self.out, e)}; lower --lr, or check the data") from None
        if ranks.first():
            tuned.save_pretrained(str(self.out))
        return facts | {"base": path, "rows": len(found), "trainable": base.trainable(tuned)}

    def _qat(self, found: Any, how: tuple[Rows, Training, Qat]) -> dict[str, Any]:
        from fewbits.finetune import qat, train
        from fewbits.model import Source
        from fewbits.runtime import load

        rows, training, what = how
        grid, source = qat.grid_of(self.grid, what), Source.open(self.source)
        if self.dtype not in (None, "float32"):
            raise RequestError(f"--dtype {self.dtype}: qat computes in float32; drop it")
        teacher, tokenizer = load(self.source, dtype="float32")
        found = found or qat.generated(teacher, qat.count(training), rows.seq_len, training.seed)
        self._ready(teacher, rows, found)
        model = qat.prepare(load(self.source, dtype="float32")[0], source, grid, what, found)
        given = teacher.requires_grad_(False) if what.distill else None
        try:
            facts = train.train(model, found, training, self.out, _pad(tokenizer), self.resume, self.tell, given)
        except train.Diverged as e:
            if not e.sound:
                raise FewbitsError(f"{e}; the step before broke the model; lower --lr") from None
            qat.write(model, source, grid, what, self.out)
            raise FewbitsError(f"{e}; the model as it was before it is in {self.out}; check the data") from None
        if ranks.first():
            facts |= qat.write(model, source, grid, what, self.out)
        return facts | {"base": self.source, "rows": len(found), "trainable": base.trainable(model)}

    def _ready(self, model: Any, rows: Rows, found: Any) -> None:
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest and rows.seq_len > longest:
            raise RequestError(
                f"--seq-len {rows.seq_len}, but the model has {longest} positions; give --seq-len {longest}"
            )
        self.tell({"event": "note", "message": f"{len(found)} rows, {sum(len(r.ids) for r in found)} tokens"})


def _place(source: str) -> str:
    """``source`` as it is found from anywhere: hub ids stay."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def _keep(tuned: Any, out: Path, e: Any) -> str:
    """Save the last good adapter: that of the step before, or that of the newest checkpoint if the former is broken."""
    from fewbits.finetune import train

    if e.sound:
        tuned.save_pretrained(str(out))
        return f"the adapter as it was before it is in {out}"
    last = train.newest(out / train.CHECKPOINTS)
    if last is None:
        return "the step before broke the adapter and no checkpoint was made yet, so none is kept"
    for file in last.glob("adapter_*"):
        shutil.copy2(file, out / file.name)
    return f"the step before broke the adapter; that of {last.name} is in {out}"


def _check(out: Path, request: dict[str, Any], resume: bool, overwrite: bool) -> bool:
    """Whether there is a run to go on with; RequestError when that, or what is in ``out``, is not what is asked for."""
    file = out / REQUEST
    if not out.exists() or not any(out.iterdir()):
        return False
    if resume and not file.is_file():
        raise RequestError(f"{out} holds no run to go on with ({REQUEST} is missing); choose another output")
    if resume:
        if changed := _changed(json.loads(file.read_text()), request):
            raise RequestError(
                f"--resume with another request: {changed}; repeat the first command, or start again with --overwrite"
            )
        return True
    if not overwrite:
        raise RequestError(f"{out} exists; choose another output, go on with --resume, or give --overwrite")
    return False


def _start(out: Path, request: dict[str, Any], resume: bool) -> None:
    """Make ``out`` with the request in it; a run that goes on must have the same rows."""
    file = out / REQUEST
    if resume:
        if json.loads(file.read_text()).get("rows_sha256") != request["rows_sha256"]:
            raise RequestError(f"--resume, but {request['data']} has changed since the run began; give --overwrite")
        return
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    file.write_text(json.dumps(request, indent=2) + "\n")


def _changed(before: dict[str, Any], now: dict[str, Any], path: str = "") -> str | None:
    for key, value in now.items():
        old = before.get(key)
        if key in FREE or value == old:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            if found := _changed(old, value, f"{path}{key}."):
                return found
            continue
        return f"{path}{key} was {old!r}, now {value!r}"
    return None


def _digest(rows: Any) -> str:
    digest = hashlib.sha256()
    for r in rows:
        digest.update(r.ids.numpy().tobytes() + r.labels.numpy().tobytes())
    return digest.hexdigest()
