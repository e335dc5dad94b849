"""``fewbits merge``: an adapter and its base become one checkpoint, if that keeps what was tuned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, choice, console, emit, human, number, stderr
from fewbits.cli.progress import Progress
from fewbits.errors import QualityError, RequestError

SHARE = 0.5
"""Of what tuning changed, as KL, that rounding may undo unless --max-kl says otherwise."""


def command(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory that `fewbits finetune` or peft made.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    base: Annotated[
        str | None, typer.Option(help="The model under the adapter; default: what it was trained on.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How the merged weights are rounded: gptq, awq, rtn ...; none: dense.")
    ] = "gptq",
    grid: Annotated[str | None, typer.Option(help="Numbers in place of the method's: nf4, int4, mxfp4 ...")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per code; default: the method's own.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 is a whole row.")] = None,
    format: Annotated[str | None, typer.Option(help="fewbits, gptq, awq, bitsandbytes ...")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Text file, or a fetched text: c4, wiki, code.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Refuse a larger KL from the tuned model; default: half of what tuning changed."
        ),
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text for KL; default: what was trained on, or wikitext2.")
    ] = None,
    eval_ctx: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    eval_windows: Annotated[int, typer.Option(help="Windows.")] = 8,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base: dequantize, add, round again, and measure what that costs.

    KL from the tuned model (base and adapter) is measured for the result and for the base without the adapter. A result
    that loses more than half of what tuning changed, or more than --max-kl, is not written (exit 3).

    [bold]Examples[/bold]

        fewbits merge ./tuned ./merged-int4 --method gptq --bits 4 --calibration code

        fewbits merge ./tuned ./merged --method none
    """
    from fewbits.finetune import merge_dense
    from fewbits.finetune.base import require
    from fewbits.methods import METHODS

    if method != "none":
        choice(method, METHODS, "method")
    if out.exists():
        raise RequestError(f"{out} exists; choose another output")
    if max_kl is not None and not max_kl >= 0:
        raise RequestError(f"--max-kl {max_kl} is not a limit; give a number of nats, 0 or more")
    require("peft")
    work = out.with_name(out.name + ".merging")
    shutil.rmtree(work, ignore_errors=True)
    try:
        stderr(f"merging {adapter} ...")
        dense = merge_dense(adapter, work / "dense", base)
        if method == "none":
            dense.rename(out)
            result: dict[str, Any] = {"out": str(out), "method": method, "size_bytes": _bytes(out)}
        else:
            options: dict[str, Any] = {"method": method, "grid": grid, "bits": bits, "group_size": group_size}
            options |= {"format": format, "calibration": calibration, "samples": samples, "seq_len": seq_len}
            result = rounded(dense, work / "out", options)
            how = (eval_text or _text(adapter), eval_ctx, eval_windows)
            result |= measure(adapter, base, dense, work / "out", how)
            gate(result, max_kl)
            (work / "out").rename(out)
            result["out"] = str(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(result)
    if as_json:
        emit(result)


def rounded(dense: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Quantize the merged model."""
    from fewbits.api import quantize

    with Progress("quantizing", "block", "blocks") as progress:
        result: Any = quantize(dense, out, **options, on_event=progress)
    found: dict[str, Any] = result.to_json()
    return found


def measure(
    adapter: Path, base: str | None, dense: Path, out: Path, how: tuple[str | None, int, int]
) -> dict[str, Any]:
    """KL from the tuned model of the result (``kl_after``) and of the base without the adapter (``kl_untuned``)."""
    from fewbits.evaluate import evaluate
    from fewbits.finetune.merge import base_of

    text, ctx, windows = how
    found: dict[str, Any] = {}
    for key, path in (("kl_after", str(out)), ("kl_untuned", base or base_of(adapter))):
        with Progress("evaluating", "window", "windows") as progress:
            scored = evaluate(path, text=text, ctx=ctx, windows=windows, reference=dense, on_event=progress)
        found[key] = scored.kl_mean
        found[f"{key}_ci95"] = list(scored.kl_mean_ci95 or ())
    return found | {"text": text or "wikitext2"}


def gate(found: dict[str, Any], max_kl: float | None) -> None:
    """QualityError when the merged model is too far from the tuned one."""
    after, untuned = found["kl_after"], found["kl_untuned"]
    limit = SHARE * untuned if max_kl is None else max_kl
    found["max_kl"] = limit
    if not after <= limit:
        reason = f"--max-kl {limit:g}" if max_kl is not None else f"{limit:.4f}, half of what tuning changed"
        raise QualityError(
            f"KL of the merged model from the tuned one is {after:.4f}, above {reason}; nothing was written: take "
            "another --method, more --bits or a smaller --group-size, keep the adapter apart, or set --max-kl"
        )


def _text(adapter: Path) -> str | None:
    from fewbits.finetune.merge import text_of

    return text_of(adapter)


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def report(found: dict[str, Any]) -> None:
    """The summary for people on stderr."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("merged", found["out"])
    if "kl_after" in found:
        table.add_row("KL from the tuned model, merged and rounded", number(found["kl_after"], 5))
        table.add_row("KL from the tuned model, base without adapter", number(found["kl_untuned"], 5))
        table.add_row("bits per weight", number(found["bits_per_weight"], 3))
    table.add_row("size", human(found["size_bytes"]))
    console().print(table)
