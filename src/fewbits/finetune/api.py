"""``finetune``: a model and a file in, an adapter directory out."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError, RequestError
from fewbits.finetune import base
from fewbits.finetune.base import METHODS, Adapter, OnEvent, Result, Rows, Training
from fewbits.pipeline.job import peak_rss

REQUEST = "finetune.json"
FREE = ("save_steps",)
"""Settings that may differ when a run goes on."""


def finetune(
    source: str | Path,
    out: str | Path,
    data: str | Path,
    *,
    method: str = "qlora",
    grid: str = "nf4-dq",
    adapter: Adapter | None = None,
    rows: Rows | None = None,
    training: Training | None = None,
    dtype: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> Result:
    """Train adapters on a frozen base and save them, in peft's format, in directory ``out``.

    ``source`` is a transformers directory, a hub id or a GGUF file. "qlora" (arXiv 2305.14314) rounds a dense model to
    ``grid`` first, into ``out/base``, and takes an already quantized checkpoint as it is; "lora" keeps a dense model
    dense. ``data`` is a .jsonl, .parquet or text file, or the name of a fetched text. ``dtype`` is what is computed in.

    ``out`` also gets ``log.jsonl`` (a line per step) and ``checkpoints``; ``resume`` goes on from the last whole one.
    Raises RequestError for requests and data that are wrong, FewbitsError, naming the step, for a loss that is not
    finite: the adapter of the step before is kept.
    """
    for package in ("peft", "accelerate"):
        base.require(package)
    if method not in METHODS:
        raise RequestError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}")
    from fewbits.finetune import data as texts
    from fewbits.finetune import model as bases

    started, out = time.perf_counter(), Path(out)
    adapter, rows, training = adapter or Adapter(), rows or Rows(), training or Training()
    tell = on_event or (lambda event: None)
    settings = {"adapter": asdict(adapter), "rows": asdict(rows), "training": asdict(training)}
    request: dict[str, Any] = {"source": _place(source), "data": str(data), "method": method, "grid": grid}
    request = json.loads(json.dumps(request | {"dtype": dtype} | settings))
    resume = _check(out, request, resume, overwrite)
    found = texts.read(data, bases.tokenizer_of(str(source)), rows)
    request["rows_sha256"] = _digest(found)
    _start(out, request, resume)
    try:
        path = bases.prepare(str(source), out, method, grid, tell)
        model, tokenizer = bases.open_base(path, method, dtype)
        _fits(model, rows)
        tell({"event": "note", "message": f"{len(found)} rows, {sum(len(r.ids) for r in found)} tokens"})
        facts = _run(model, tokenizer, found, (adapter, training), (out, _place(source)), resume, tell)
    except RequestError:
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return Result(
        out=str(out),
        method=method,
        base=path,
        rows=len(found),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss(),
        **facts,
    )


def _run(
    model: Any,
    tokenizer: Any,
    rows: Any,
    how: tuple[Adapter, Training],
    where: tuple[Path, str],
    resume: bool,
    tell: OnEvent,
) -> dict[str, Any]:
    from fewbits.finetune import adapter as adapters
    from fewbits.finetune import train

    (adapter, training), (out, source) = how, where
    tuned = adapters.attach(model, adapter, source, training.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    try:
        facts = train.train(tuned, rows, training, out, pad, resume, tell)
    except train.Diverged as e:
        raise FewbitsError(f"{e}; {_keep(tuned, out, e)}; lower --lr, or check the data") from None
    tuned.save_pretrained(str(out))
    return facts | {"trainable": adapters.trainable(tuned)}


def _place(source: str | Path) -> str:
    """``source`` as it is found from anywhere: hub ids stay."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(source)


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


def _fits(model: Any, rows: Rows) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and rows.seq_len > longest:
        raise RequestError(f"--seq-len {rows.seq_len}, but the model has {longest} positions; give --seq-len {longest}")
