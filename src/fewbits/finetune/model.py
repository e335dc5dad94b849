"""The frozen base of a run: a dense model is quantized first, block by block, into a checkpoint beside the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits import methods
from fewbits.errors import RequestError
from fewbits.finetune.base import OnEvent
from fewbits.finetune.data import Row
from fewbits.grids import Table
from fewbits.kernels import multiplies_bf16
from fewbits.model import Source, locate
from fewbits.pipeline.job import Job
from fewbits.pipeline.precision import default_compute
from fewbits.plan import Calibration
from fewbits.runtime import QuantLinear, load
from fewbits.runtime.loading import gguf_file

BASE = "base"
CALIBRATED = 128
"""Rows of the training data from which the codes of a base are chosen, where its method reads any."""
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def prepare(source: str, out: Path, method: str, grid: str, rows: Sequence[Row], tell: OnEvent) -> str:
    """The checkpoint to train on: ``source`` itself where it is quantized already, else ``out/base``, by a quantization
    ``method`` on ``grid``, calibrated on the ``rows`` if it reads any. What was made by an earlier, interrupted run is
    used again. Raises RequestError for a method that moves scales between layers.
    """
    if gguf_file(source) is not None or _quantized(source):
        if method != "rtn":
            raise RequestError(f"--base-method {method} rounds a dense model, and {source} is quantized; drop it")
        return source
    made = out / BASE
    if (made / "config.json").is_file():
        return str(made)
    chosen = methods.named(grid)
    opened = Source.open(source)
    ids = cut(rows)
    plan = methods.plan(
        method,
        None,
        None,
        None,
        grid,
        format="bitsandbytes" if isinstance(chosen, Table) else "fewbits",
        calibration=Calibration("the training data", *ids.shape),
        compute=default_compute(),
        dtype=NAMES.get(opened.dtype, "float32"),
    )
    if plan.transforms:
        raise RequestError(
            f"--base-method {method} moves scales between layers, and adapters would not fit the original model; give "
            "rtn or gptq, or quantize first and train on the result"
        )
    plan = replace(plan.with_scales(plan.dtype), seed=0)
    Job.check(opened, plan, rows=ids if plan.needs else None, held_out=None, emit=tell).run(made)
    return str(made)


def cut(rows: Sequence[Row]) -> Tensor:
    """What is trained on as at most ``CALIBRATED`` rows of the longest row's length, from everywhere in it: int64
    ``[rows, tokens]``.
    """
    ids, length = torch.cat([r.ids for r in rows]), max(len(r.ids) for r in rows)
    whole = ids[: len(ids) // length * length].view(-1, length)
    chosen = torch.linspace(0, len(whole) - 1, min(CALIBRATED, len(whole))).round().long()
    return whole[chosen]


def open_base(path: str, method: str, dtype: str | None) -> tuple[Any, Any]:
    """``(model, tokenizer)``. Raises RequestError when ``method`` is qlora and nothing in it is quantized."""
    model, tokenizer = load(path, dtype=_dtype(dtype))
    if method == "qlora" and not any(isinstance(m, QuantLinear) for m in model.modules()):
        raise RequestError(
            f"{path} has no quantized layer that qlora could keep; give its original model, or --method lora"
        )
    return model, tokenizer


@torch.no_grad()
def observe(model: Any, watched: Mapping[nn.Module, Callable[[Tensor], None]], rows: Sequence[Row]) -> None:
    """Send ``rows`` through ``model``, one at a time; each watched layer's input ``[1, tokens, in]`` is told."""
    hooks = [m.register_forward_pre_hook(lambda _, given, tell=tell: tell(given[0])) for m, tell in watched.items()]
    try:
        for row in rows:
            model(input_ids=row.ids[None], position_ids=row.positions[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def tokenizer_of(source: str) -> Any:
    """The tokenizer, before anything of the model is read. Raises RequestError when there is none."""
    from transformers import AutoTokenizer

    file = gguf_file(source)
    try:
        if file is not None:
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return AutoTokenizer.from_pretrained(locate.directory(source))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RequestError(f"{source} has no tokenizer that transformers can load: {locate.first_line(e)}") from e


def _quantized(source: str) -> bool:
    return bool(locate.read_config(locate.directory(source)).get("quantization_config"))


def _dtype(name: str | None) -> torch.dtype:
    """What is computed in: bfloat16 where the processor multiplies it natively, else float32."""
    found = getattr(torch, name or ("bfloat16" if multiplies_bf16() else "float32"), None)
    if found not in NAMES or found == torch.float16:
        raise RequestError(f"--dtype {name!r} is not possible; allowed: float32, bfloat16")
    return found
