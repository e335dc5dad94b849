"""``fewbits quantize``: a dense model in, a quantized one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import (
    Debug,
    Json,
    Tuned,
    TuneSteps,
    Verbose,
    choice,
    console,
    emit,
    human,
    lower,
    number,
    size,
    stderr,
    tuned,
)
from fewbits.cli.gate import Gate
from fewbits.cli.log import Log
from fewbits.cli.progress import Progress


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A transformers directory or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    method: Annotated[
        str, typer.Option(callback=lower, help="rtn, gptq, awq, ...; for GGUF q4_k_m, q4_k_m+imatrix, ...")
    ] = "gptq",
    grid: Annotated[
        str | None, typer.Option(help="Numbers in place of the method's: fp8, mxfp4, nvfp4, int4, ...")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per code; default: the method's own.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 is a whole row.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(metavar="S", help="Weights made zero by sparsegpt, obs, obd, magnitude: 0.5, or 2:4.")
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--affine", help="Zero point in the middle, or free; default: the format's."),
    ] = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Quantize the output head too, where it is not the embedding itself.")
    ] = False,
    activations: Annotated[
        str | None,
        typer.Option(metavar="G", help="Inputs too: int8, int8-static, fp8, fp8-static, int4, nvfp4, mxfp4, none."),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(metavar="G", help="What readers should keep keys and values in: int8, fp8, int4, int2."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="fewbits, gptq, awq, bitsandbytes, gguf, ...")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Text file, or a fetched text: c4, wiki, code.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    tune: Tuned = False,
    tune_steps: TuneSteps = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE|PRESET", help="A plan in YAML instead of the flags.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Spill activations to disk above it: 4GiB, 500MB.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it exists.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    compute: Annotated[
        str | None, typer.Option(help="What calibration runs in: bf16, fp32 or fixed; default: the fastest here.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and how large it gets; write nothing.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Times and memory of every step, for `fewbits report --log`.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="X", help="Exit 3 when KL from the original is larger.")
    ] = None,
    max_ppl_ratio: Annotated[
        float | None, typer.Option(metavar="R", help="Exit 3 when perplexity over the original's is larger.")
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text for these limits; default wikitext2.")
    ] = None,
    eval_ctx: Annotated[int, typer.Option(help="Tokens per window for these limits.")] = 2048,
    eval_windows: Annotated[int, typer.Option(help="Windows for these limits.")] = 5,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize the linear layers of a model.

    [bold]Examples[/bold]

        fewbits quantize ./smollm2 ./smollm2-int4 --bits 4 --group-size 64

        fewbits quantize ./model ./out --method awq --format awq --calibration my.txt

        fewbits quantize ./model ./out-int2 --bits 2 --group-size 64 --tune --samples 32

        fewbits quantize ./model ./out --max-kl 0.1 --eval-text held-out.txt --json

    An interrupted run goes on with the same command and --resume.
    """
    gate = Gate(max_kl, max_ppl_ratio, eval_text, eval_ctx, eval_windows)
    gate.check()
    memory = size(max_memory, "--max-memory")
    known(method, format, grid)
    options: dict[str, Any] = {
        "method": method,
        "grid": grid,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "sparsity": sparsity,
        "lm_head": lm_head,
        "activations": activations,
        "kv_cache": kv_cache,
        "format": format,
        "calibration": calibration,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "tune": tuned(tune, tune_steps),
        "recipe": recipe,
        "max_memory": memory,
        "resume": resume,
        "overwrite": overwrite,
        "device": device,
        "compute": compute,
        "dry_run": dry_run,
    }
    result = run(src, out, options, verbose, log)
    if dry_run:
        show_plan(src, result, verbose, as_json)
        return
    if gate:
        result |= gate.measure(src, out)
    report(result, as_json)
    if gate:
        gate.require(result, out)


def known(method: str, format: str | None, grid: str | None = None) -> None:
    """RequestError for a method, a format or a grid that does not exist, before anything is loaded."""
    from fewbits.formats import LAYOUTS
    from fewbits.grids import NAMED_GRIDS
    from fewbits.methods import METHODS
    from fewbits.pipeline.mixture import NAMES, is_mixture

    choice(method, NAMES if is_mixture(method) else METHODS, "method")
    if format is not None:
        choice(format, LAYOUTS, "format")
    if grid is not None:
        choice(grid, NAMED_GRIDS, "grid")


def run(src: str, out: Path, options: dict[str, Any], verbose: bool, log: Path | None = None) -> dict[str, Any]:
    """Quantize with a progress bar; the result as JSON types. ``log`` gets the times of the steps."""
    from fewbits.api import quantize

    stderr(f"quantizing {src} with {options['method']} ...")
    logged = Log(None if options["dry_run"] else log)
    with Progress("quantizing", "block", "blocks", verbose) as progress:

        def tell(event: dict[str, Any]) -> None:
            progress(event)
            logged(event)

        result: Any = quantize(src, out, **options, on_event=tell)
    return planned(result, out) if options["dry_run"] else dict(result.to_json())


def planned(job: Any, out: Path) -> dict[str, Any]:
    """What a dry run says of a checked job: see `fewbits plan`."""
    from fewbits.advise import forecast

    return {"dry_run": True, "out": str(out)} | forecast(job).to_json()


def show_plan(src: str, found: dict[str, Any], verbose: bool, as_json: bool) -> None:
    """As `fewbits plan` prints it."""
    from fewbits.cli.plan import report

    report(src, found, verbose)
    if as_json:
        emit(found)


def report(result: dict[str, Any], as_json: bool) -> None:
    """The summary for people on stderr, and the JSON line."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    tensors = result.get("tensors")
    rows = {
        "out": str(result.get("out")),
        "method": str(result.get("method")),
        "format": result.get("format"),
        "bits per weight": number(result.get("bits_per_weight"), 3),
        "size": human(result.get("size_bytes")),
        "tensors": str(len(tensors) if isinstance(tensors, (list, tuple, dict)) else tensors),
        "seconds": number(result["seconds"], 1) if "seconds" in result else None,
        "peak memory": human(result["peak_rss_bytes"]) if "peak_rss_bytes" in result else None,
        "KL on held-out calibration rows": number(result["kl"]) if result.get("kl") is not None else None,
        "KL from the original": number(result["kl_mean"]) if "kl_mean" in result else None,
        "perplexity over the original's": number(result["ppl_ratio"]) if "ppl_ratio" in result else None,
    }
    for key, value in rows.items():
        if value is not None:
            table.add_row(key, value)
    console().print(table)
    if as_json:
        emit(result)
