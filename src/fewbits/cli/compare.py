"""``fewbits compare``: several methods on one model, in one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, choice, console, emit, lower, stderr
from fewbits.cli.bench import sizes
from fewbits.cli.progress import Progress
from fewbits.errors import RequestError

WIDE = 150


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A transformers directory or a hub id.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoints, figures, table and page.")],
    methods: Annotated[
        str, typer.Option(metavar="M,M,...", callback=lower, help="As --method of quantize.")
    ] = "rtn,gptq,awq",
    bits: Annotated[str | None, typer.Option(metavar="B,B,...", help="For methods that take --bits.")] = None,
    formats: Annotated[
        str | None, typer.Option(metavar="F,F,...", help="Each cell in each; default: the method's own.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale.")] = None,
    text: Annotated[str, typer.Option(metavar="FILE", help="Text that is scored: a file or a fetched one.")] = (
        "wikitext2"
    ),
    domains: Annotated[
        str | None, typer.Option(metavar="NAME=FILE,...", help="More texts: which one suffers most?")
    ] = None,
    ctx: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 20,
    calibration: Annotated[str, typer.Option(metavar="SPEC", help="Text file, or c4, wiki, code.")] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    stream: Annotated[
        str,
        typer.Option(help="Calibrate on the original model (once for all), or each on its quantized blocks."),
    ] = "original",
    compute: Annotated[str | None, typer.Option(help="What calibration runs in: bf16, fp32, fixed.")] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time every model too.")] = True,
    discard: Annotated[bool, typer.Option("--discard", help="Remove each checkpoint once it is measured.")] = False,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write DIR/index.html (needs plotly).")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a model in several ways, measure all of them on the same text, and show which way is worth it.

    [bold]Examples[/bold]

        fewbits compare ./smollm2 --methods rtn,gptq,awq,q4_k_m,nf4 --bits 4,3 --out ./compared

        fewbits compare ./model --methods gptq,awq --bits 4 --domains code=code.txt,chat=chat.txt --out ./compared

    Killed and started again with the same options, it goes on where it stopped.
    """
    from fewbits.compare import Comparison, Setting, cells
    from fewbits.plan import STREAMS

    asked = cells(
        [m.strip() for m in methods.split(",") if m.strip()],
        sizes(bits, "--bits") if bits else (),
        [known_format(f.strip()) for f in formats.split(",")] if formats else (),
        group_size,
    )
    setting = Setting(
        text=text,
        domains=pairs(domains),
        ctx=ctx,
        windows=windows,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        stream=choice(stream, STREAMS, "stream"),
        compute=compute,
        speed={"batches": [1]} if speed else None,
        discard=discard,
    )
    stderr(f"comparing {', '.join(c.name for c in asked)} on {src} ...")
    with Progress("comparing", "block", "blocks") as blocks, Progress("comparing", "window", "windows") as windows_:

        def tell(event: dict[str, Any]) -> None:
            (windows_ if event.get("event") == "window" else blocks)(event)

        found = Comparison(src, out, asked, setting, tell, overwrite).run()
    show(found, out, html)
    if as_json:
        emit(brief(found, out))


def known_format(name: str) -> str:
    """RequestError for a format that does not exist."""
    from fewbits.formats import LAYOUTS

    return choice(name, LAYOUTS, "format")


def pairs(text: str | None) -> dict[str, str]:
    """``code=FILE,chat=FILE`` as a table; RequestError for anything else."""
    found: dict[str, str] = {}
    for item in text.split(",") if text else ():
        name, sign, value = item.partition("=")
        if not (name.strip() and sign and value.strip()) or name.strip() in found:
            raise RequestError(f"--domains {item!r} is not NAME=FILE; give some, as in code=code.txt,chat=chat.txt")
        found[name.strip()] = value.strip()
    return found


def show(found: dict[str, Any], out: Path, html: bool) -> None:
    """The table for people, as Markdown beside the cells, and the page."""
    from rich.table import Table

    from fewbits import compare
    from fewbits.report import comparison

    head, *body = compare.rows(found)
    table = Table(title=f"{found['source']}", title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    screen = console()
    screen.width = max(screen.width, WIDE)  # a table whose figures are cut off is none
    screen.print(table)
    for note in compare.table.notes(found):
        stderr(note)
    (out / "table.md").write_text(compare.markdown(found), encoding="utf-8")
    if html:
        try:
            (out / "index.html").write_text(comparison.page(found | {"table": [head, *body]}), encoding="utf-8")
        except RequestError as e:
            stderr(f"note: no page: {e}")


def brief(found: dict[str, Any], out: Path) -> dict[str, Any]:
    """The JSON of ``--json``: figures without tensors, events and texts."""
    long = {"tensors", "plan", "histogram", "worst_tokens"}
    page = out / "index.html"
    return {
        "out": str(out),
        "html": str(page) if page.exists() else None,
        "source": found["source"],
        "texts": found["texts"],
        "reference": {k: v for k, v in found["reference"].items() if k not in long | {"distribution"}},
        "cells": [{k: v for k, v in c.items() if k not in long} for c in found["cells"]],
        "shared": found["shared"],
    }
