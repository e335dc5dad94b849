"""The frozen base of a run: a dense model is quantized first, block by block, into a checkpoint beside the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbits import methods
from fewbits.errors import RequestError
from fewbits.finetune.base import OnEvent
from fewbits.grids import Table
from fewbits.kernels import multiplies_bf16
from fewbits.model import Source, locate
from fewbits.pipeline.job import Job
from fewbits.plan import Calibration
from fewbits.runtime import QuantLinear, load
from fewbits.runtime.loading import gguf_file

BASE = "base"
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def prepare(source: str, out: Path, method: str, grid: str, tell: OnEvent) -> str:
    """The checkpoint to train on: ``source`` itself where it is quantized already or ``method`` wants it dense, else
    ``out/base``, rounded to nearest on ``grid``. What was made by an earlier, interrupted run is used again.
    """
    if method == "lora" or gguf_file(source) is not None or _quantized(source):
        return source
    made = out / BASE
    if (made / "config.json").is_file():
        return str(made)
    chosen = methods.named(grid)
    opened = Source.open(source)
    plan = methods.plan(
        "rtn",
        None,
        None,
        None,
        grid,
        format="bitsandbytes" if isinstance(chosen, Table) else "fewbits",
        calibration=Calibration(),
        compute="fp32",
        dtype=NAMES.get(opened.dtype, "float32"),
    )
    plan = replace(plan.with_scales(plan.dtype), seed=0)
    Job.check(opened, plan, rows=None, held_out=None, emit=tell).run(made)
    return str(made)


def open_base(path: str, method: str, dtype: str | None) -> tuple[Any, Any]:
    """``(model, tokenizer)``. Raises RequestError when ``method`` is qlora and nothing in it is quantized."""
    model, tokenizer = load(path, dtype=_dtype(dtype))
    if method == "qlora" and not any(isinstance(m, QuantLinear) for m in model.modules()):
        raise RequestError(
            f"{path} has no quantized layer that qlora could keep; give its original model, or --method lora"
        )
    return model, tokenizer


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
