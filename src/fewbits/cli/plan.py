"""``fewbits plan``: what a run would write, need and take, before any of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, Tuned, TuneSteps, Verbose, console, emit, human, lower, number, size, tuned
from fewbits.errors import RequestError


def command(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A transformers directory (config.json will do) or a hub id.")
    ],
    method: Annotated[str, typer.Option(callback=lower, help="As for quantize.")] = "gptq",
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
    tune: Tuned = False,
    tune_steps: TuneSteps = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="As for quantize.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="The device to run on: 24GiB.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a sequence, for the KV cache.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    bandwidth: Annotated[str | None, typer.Option(metavar="SIZE", help="Of its memory per second: 936GB.")] = None,
    purpose: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="TARGET",
            help="Which method? hopper, blackwell, ada, ampere, cpu, edge, finetune or quality; ranked, with reasons.",
        ),
    ] = None,
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

        fewbits plan ./model --for hopper --memory 80GB --batch 64
    """
    from fewbits.advise.forecast import Target, forecast
    from fewbits.advise.headers import open_headers
    from fewbits.api import quantize

    rate = size(bandwidth, "--bandwidth")
    target = Target(size(memory, "--memory"), context, batch, None if rate is None else float(rate))
    source = open_headers(src)
    if purpose is not None:
        advice = advise(source, purpose, target)
        show_advice(src, advice, verbose)
        if as_json:
            emit({"source": src} | advice)
        return
    options: dict[str, Any] = {"grid": grid, "bits": bits, "group_size": group_size, "symmetric": symmetric}
    options |= {"lm_head": lm_head, "activations": activations, "kv_cache": kv_cache, "format": format}
    options |= {
        "samples": samples,
        "seq_len": seq_len,
        "recipe": recipe,
        "tune": tuned(tune, tune_steps),
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


# ---- which method ----------------------------------------------------------------------------------------------------

_GROUPS = (128, 64, 32)


def advise(source: Any, purpose: str, target: Any) -> dict[str, Any]:
    """Ranked methods for a model and a purpose, each planned for this model; as JSON types."""
    from fewbits.advise.advice import Situation, advise

    situation = Situation(purpose, target.batch, target.context)
    bits = None
    if target.memory is not None:
        bits = planned(source, {"method": "rtn", "format": "fewbits"}, target).largest
    return advise(replace(situation, bits=bits), lambda option: planned(source, option, target)).to_json()


def planned(source: Any, option: Mapping[str, Any], target: Any) -> Any:
    """The plan of an option of the advice, in smaller groups where the model's widths want them."""
    from fewbits.advise.forecast import forecast
    from fewbits.api import quantize

    fields: dict[str, Any] = {k: option[k] for k in ("method", "format", "activations") if k in option}
    fields |= option.get("options") or {}
    groups = [g for g in _GROUPS if g <= fields["group_size"]] if "group_size" in fields else [None]
    for group in groups:
        given = fields if group is None else fields | {"group_size": group}
        try:
            job: Any = quantize(source, Path("planned"), dry_run=True, **given)
        except RequestError:
            if group == groups[-1]:
                raise
            continue
        return forecast(job, target, measure=False)


def show_advice(src: str, advice: dict[str, Any], verbose: bool) -> None:
    """The best three with their reasons (all with ``verbose``), then what else is worth saying."""
    out = console()
    out.print(f"{src}: for {advice['target']}, {advice['batch']} x {advice['context']} tokens", markup=False)
    shown = advice["choices"] if verbose else advice["choices"][:3]
    for i, c in enumerate(shown, 1):
        size_of = human(c["size_bytes"]) if c["size_bytes"] else "size unknown"
        short = "" if c["fits"] else "  DOES NOT FIT"
        out.print(f"{i}. {c['flags']}  ({number(c['bits_per_weight'], 2)} bits, {size_of}){short}", markup=False)
        for r in c["reasons"]:
            out.print(f"   {r['why']}\n   {r['figure']} [{r['source']}]", markup=False)
    for a in advice["also"]:
        out.print(f"also {a['flags']}: {a['why']} ({a['figure']})", markup=False)
    for w in advice["warnings"]:
        out.print(f"beware: {w['warning']}: {w['figure']} [{w['source']}]", markup=False)
