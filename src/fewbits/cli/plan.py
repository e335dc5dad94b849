"""``fewbits plan``: what a run would write, need and take, before any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, Verbose, console, emit, human, number, size


def command(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A transformers directory (config.json will do) or a hub id.")
    ],
    method: Annotated[str, typer.Option(help="As for quantize.")] = "gptq",
    grid: Annotated[str | None, typer.Option(help="As for quantize.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per code; default: the method's own.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 is a whole row.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--affine", help="As for quantize.")] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output head too.")] = False,
    activations: Annotated[str | None, typer.Option(metavar="G", help="Quantized inputs, as for quantize.")] = None,
    kv_cache: Annotated[str | None, typer.Option(metavar="G", help="KV cache: int8, fp8, int4, int2.")] = None,
    format: Annotated[str | None, typer.Option(help="fewbits, gptq, awq, bitsandbytes, gguf, ...")] = None,
    samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="A plan in YAML instead of the flags.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="As for quantize.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="The device to run on: 24GiB.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a sequence, for the KV cache.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    bandwidth: Annotated[str | None, typer.Option(metavar="SIZE", help="Of its memory per second: 936GB.")] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time and memory of quantizing here.")] = True,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say how large a quantized model will be, where it fits, how fast it can be, and what making it takes here.

    Only headers are read, and a config.json alone is enough. Sizes are exact to the byte of the tensors.

    [bold]Examples[/bold]

        fewbits plan ./model --method awq --bits 4 --memory 24GiB --context 8192

        fewbits plan ./model --method q4_k_m --json
    """
    from fewbits.advise.forecast import Target, forecast
    from fewbits.advise.headers import open_headers
    from fewbits.api import quantize

    rate = size(bandwidth, "--bandwidth")
    target = Target(size(memory, "--memory"), context, batch, None if rate is None else float(rate))
    source = open_headers(src)
    options: dict[str, Any] = {"grid": grid, "bits": bits, "group_size": group_size, "symmetric": symmetric}
    options |= {"lm_head": lm_head, "activations": activations, "kv_cache": kv_cache, "format": format}
    options |= {
        "samples": samples,
        "seq_len": seq_len,
        "recipe": recipe,
        "max_memory": size(max_memory, "--max-memory"),
    }
    job: Any = quantize(source, Path("planned"), method=method, dry_run=True, **options)
    found = forecast(job, target, measure).to_json()
    report(src, found, verbose)
    if as_json:
        emit({"source": src} | found)


def report(src: str, found: dict[str, Any], verbose: bool = False) -> None:
    """Two tables: what is written, and what it means."""
    from rich.table import Table

    out = console()
    title = f"{src}: {found['method']} in format {found['format']}"
    parts = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("component", "size", "share"):
        parts.add_column(name, justify="left" if name == "component" else "right")
    for part, count in found["components"].items():
        parts.add_row(part, human(count), f"{count / found['size_bytes']:.1%}")
    parts.add_row("all tensors", human(found["size_bytes"]), "" if found["exact"] else "nearly")
    out.print(parts)
    facts = Table(show_header=False, box=None, pad_edge=False)
    for key, value in _facts(found).items():
        if value is not None:
            facts.add_row(key, value)
    out.print(facts)
    for name in found["protected"] if verbose else ():
        out.print(f"stays dense: {name}", markup=False)
    for line in found["warnings"]:
        out.print(f"note: {line}", markup=False)


def _facts(found: dict[str, Any]) -> dict[str, str | None]:
    fit, decode = found["fit"], found["decode_tokens_per_s_at_most"]
    load = "-" if fit is None else f"{human(fit['needed_bytes'])} of {human(fit['capacity_bytes'])}"
    kept = found["protected"]
    return {
        "bits per weight": f"{number(found['bits_per_weight'], 3)} in {found['tensors']} linear layers, "
        f"{number(found['bits_per_parameter'], 2)} over all parameters",
        "KV cache": f"{human(found['kv_cache_bytes'])} for {found['batch']} x {found['context']} tokens",
        "fits": None
        if fit is None
        else f"{'yes' if fit['fits'] else 'NO'}: {load} with cache and {human(fit['overhead_bytes'])} overhead; "
        f"up to {number(fit['largest_bits_per_weight'], 2)} bits per weight would",
        "decoding, at most": ", ".join(f"{name} {speed:.3g}/s" for name, speed in decode.items()),
        "quantizing here": None
        if found["seconds"] is None
        else f"about {found['seconds']:.0f} s, {human(found['peak_rss_bytes'])} at the peak ({found['peak_phase']})",
        "stay dense": f"{len(kept)} linear layers ({', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''})"
        if kept
        else None,
        "tied": ", ".join(found["tied"]) + " is the embedding itself and stays with it" if found["tied"] else None,
    }
