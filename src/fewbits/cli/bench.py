"""``fewbits bench``: load time, memory, prompt and decode tokens per second on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, console, emit, human, number, stderr
from fewbits.errors import RequestError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense or quantized checkpoint.")],
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="Another one, usually the original, in the same run.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="B,B,...", help="Sequences at a time.")] = "1,4,8",
    prompt: Annotated[int, typer.Option(help="Tokens per prompt.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds; figures are their medians.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="What the models compute in; default: their own.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also as one page that works offline.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a model: each one alone in a new process, medians after a warm-up.

    [bold]Examples[/bold]

        fewbits bench ./smollm2-int4 --reference ./smollm2

        fewbits bench ./smollm2-int4 --batch 1,16 --prompt 512 --tokens 64 --json
    """
    from fewbits.evaluate.speed import bench

    how: dict[str, Any] = {"batches": sizes(batch), "prompt": prompt, "tokens": tokens, "repeats": repeats}
    stderr(f"timing {model} ...")
    found = bench(model, **how, dtype=dtype)
    if reference is not None:
        stderr(f"timing {reference} ...")
        found["reference"] = bench(reference, **how, dtype=dtype)
        found["speedup"] = {
            k: found[f"{k}_tokens_per_s"] / found["reference"][f"{k}_tokens_per_s"] for k in ("decode", "prompt")
        }
    report(found)
    if html is not None:
        from fewbits.report import speed

        html.write_text(speed.page(found), encoding="utf-8")
        found["html"] = str(html)
    if as_json:
        emit(found)


def sizes(text: str, option: str = "--batch") -> list[int]:
    """``1,4,8`` as numbers; RequestError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{option} {text!r} is not a list of whole numbers; give some, as in 1,4,8") from None


def report(found: dict[str, Any]) -> None:
    """A table: one column per model."""
    from rich.table import Table

    models = [m for m in (found, found.get("reference")) if m]
    table = Table(
        title=f"prompts of {found['prompt']} tokens, {found['tokens']} decoded, {found['threads']} threads",
        title_justify="left",
    )
    table.add_column("figure")
    for m in models:
        table.add_column(f"{m['model']} ({m['dtype']})", justify="right", overflow="fold")
    rows: dict[str, list[str]] = {
        "load, seconds": [number(m["load_seconds"], 2) for m in models],
        "memory of the model": [human(m["memory_bytes"]) for m in models],
        "peak memory of the process": [human(m["peak_rss_bytes"]) for m in models],
        "size on disk": [human(m["size_bytes"]) for m in models],
    }
    for i, rate in enumerate(found["batches"]):
        for kind in ("prompt", "decode"):
            rates = [m["batches"][i][f"{kind}_tokens_per_s"] for m in models]
            rows[f"{kind} tokens/s, batch {rate['batch']}"] = [number(r, 1) for r in rates]
    for name, values in rows.items():
        table.add_row(name, *values)
    console().print(table)
