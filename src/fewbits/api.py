"""The Python entry point of quantization: names and numbers in, a checked job, a finished checkpoint out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits import formats, methods
from fewbits.activations import Activations, preset
from fewbits.errors import RequestError
from fewbits.grids import Grid
from fewbits.model import Source
from fewbits.model import rows as calibration_rows
from fewbits.pipeline import mixture
from fewbits.pipeline.job import Job, Result
from fewbits.pipeline.precision import PRECISIONS, default_compute
from fewbits.plan import Calibration, Plan, Rule, Tune

PROBE_TOKENS = 1024


def quantize(
    source: str | Path | Source,
    out: str | Path,
    *,
    method: str = "gptq",
    grid: str | Grid | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    sparsity: str | None = None,
    activations: str | Activations | None = None,
    kv_cache: str | None = None,
    format: str | None = None,
    calibration: str | Path | Sequence[str] | None = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    max_memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    dry_run: bool = False,
    recipe: str | Path | None = None,
    compute: str | None = None,
    dtype: str | None = None,
    lm_head: bool = False,
    stream: str = "quantized",
    tune: Tune | bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Result | Job:
    """Quantize a model into a checkpoint directory.

    ``source`` is a transformers directory, a hub id or an open Source; ``grid`` a name of
    :data:`fewbits.grids.NAMED_GRIDS` or a grid in place of the method's; ``bits``, ``group_size`` and ``symmetric``
    default to what the method's paper uses (``group_size`` -1 is per channel); ``sparsity`` is how many weights a
    pruning method makes zero ("0.5", "2:4"); ``activations`` is a scheme or the name
    of one (:data:`fewbits.activations.PRESETS`; "none" leaves inputs alone), by default the method's; ``kv_cache``
    ("int8", "fp8", ...) is written down for the reader; ``format`` is one of :data:`fewbits.formats.LAYOUTS`, by
    default :func:`fewbits.methods.home`;
    ``calibration`` a text file, texts, or the name of a fetched asset; ``max_memory`` bytes for activations;
    ``compute`` what calibration's products are in, "bf16", "fp32" or "fixed" (13-bit fixed point), by default the
    fastest on this processor; ``dtype`` in which everything that is not quantized is stored; ``lm_head`` quantizes the
    output head too, which a model with tied embeddings cannot; ``stream`` "original" calibrates each block on the
    original model's activations instead of the "quantized" ones; ``tune`` (True, or a Tune with its steps) refines
    every block by gradients once it is solved (:mod:`fewbits.tune`). ``dry_run`` returns the checked job, which can be
    run later if ``calibration`` was named: without, no text is read.

    Raises RequestError (the request cannot be carried out), CheckpointError (damaged model); see :mod:`fewbits.errors`.
    """
    if device not in (None, "cpu"):
        raise RequestError(f"device {device!r} is not available for quantizing yet; allowed: cpu")
    if compute is not None and compute not in PRECISIONS:
        raise RequestError(f"compute {compute!r} is unknown; allowed: {', '.join(PRECISIONS)}")
    if samples < 1 or seq_len < 2:
        raise RequestError(
            f"samples {samples} of {seq_len} tokens cannot calibrate; give at least 1 sample of 2 tokens"
        )
    mixed = mixture.is_mixture(method)
    home = "gguf" if mixed else methods.home(method, grid)
    layout = formats.get(format or home)
    opened = source if isinstance(source, Source) else Source.open(source)
    kept = dtype or ("float32" if layout.name == "gguf" else storage_dtype(opened))
    spec = "c4" if calibration is None else str(calibration) if isinstance(calibration, (str, Path)) else "texts"
    common: dict[str, Any] = {
        "format": layout.name,
        "calibration": Calibration(spec, samples, seq_len),
        "compute": compute or default_compute(),
        "dtype": kept,
        "seed": seed,
        "kv_cache": kv_cache,
        "stream": stream,
        "tune": (Tune() if tune is True else tune) or None,
    }
    if lm_head and (mixed or recipe is not None):
        raise RequestError(
            f"--lm-head given, but {method + ' decides that itself' if recipe is None else 'the recipe decides'}; "
            "drop --lm-head, or write a rule with match: lm_head at the top of a recipe"
        )
    if sparsity is not None and (mixed or recipe is not None):
        raise RequestError(
            f"--sparsity given, but {method + ' prunes nothing' if recipe is None else 'the recipe decides'}; write it "
            "as the solver's option of a recipe"
        )
    if tune and recipe is not None:
        raise RequestError("--tune given, but the recipe decides; write 'tune: {steps: 200}' into it")
    if recipe is not None:
        plan = read_recipe(Path(recipe), common)
    elif mixed:
        plan = mixture.plan(method, opened, **common)
    else:
        plan = methods.plan(method, bits, group_size, symmetric, grid, sparsity, **common)
    if activations is not None:
        plan = plan.with_activations(_scheme(activations))
    if lm_head:
        plan = _with_head(plan, opened.head_name)
    plan = plan.with_scales(layout.scale_dtype or kept)
    unread = dry_run and calibration is None  # a dry run reads no text that nobody named
    rows, held_out = (None, None) if unread else _rows(opened, plan, calibration)
    job = Job.check(
        opened, plan, rows=rows, held_out=held_out, max_memory=max_memory, emit=on_event or (lambda event: None)
    )
    return job if dry_run else job.run(Path(out), resume, overwrite)


def _scheme(given: str | Activations) -> Activations | None:
    if isinstance(given, Activations):
        return given
    return None if given == "none" else preset(given)


def storage_dtype(source: Source) -> str:
    """The dtype of what stays dense: the checkpoint's own if it has 16 bits, float16 for float32 weights."""
    return {torch.bfloat16: "bfloat16"}.get(source.dtype, "float16")


def read_recipe(path: Path, common: dict[str, Any]) -> Plan:
    """A plan from a YAML file; what the file does not say comes from ``common``."""
    if not path.is_file():
        raise RequestError(f"{path} is not a file; give a recipe in YAML")
    return Plan.from_yaml(path.read_text(), common)


def _with_head(plan: Plan, head: str) -> Plan:
    """``plan`` with the output head quantized as everything else is, but for its input: the last hidden state stays."""
    recipe = plan.rules[-1].recipe
    own = None if recipe is None else dataclasses.replace(recipe, activations=None)
    return dataclasses.replace(plan, rules=(Rule(head, own), *plan.rules))


def _rows(source: Source, plan: Plan, spec: Any) -> tuple[Tensor | None, Tensor | None]:
    """The calibration rows, and held-out rows that follow them in the text where it is long enough."""
    if not plan.needs:
        return None, None
    c = plan.calibration
    text, tokenizer = spec or c.spec, source.tokenizer()
    wanted = c.samples + max(1, PROBE_TOKENS // c.seq_len)
    try:
        found = calibration_rows(tokenizer, text, wanted, c.seq_len)
    except RequestError:
        return calibration_rows(tokenizer, text, c.samples, c.seq_len), None
    return found[: c.samples], found[c.samples :]
