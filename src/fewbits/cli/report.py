"""``fewbits report``: one page about a quantized checkpoint or a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, emit, human, stderr
from fewbits.errors import RequestError


def command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="What quantize or compare wrote.")],
    html: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html"),
    source: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="The original: adds histograms of weights and inputs, and outliers."),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What quantize --log wrote: adds time and memory over the run.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Text for the inputs: a file, or c4, wiki.")] = None,
    samples: Annotated[int, typer.Option(help="Rows of that text.")] = 2,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page that works offline: errors and bits by layer, the worst layers, the recipe.

    [bold]Examples[/bold]

        fewbits report ./smollm2-int4 --html report.html --source ./smollm2

        fewbits report ./smollm2-int4 --log run.jsonl

        fewbits report ./compared --html compared.html
    """
    from fewbits.compare.folder import IDENTITY

    studied: dict[str, Any] | None = None
    if source is not None:
        from fewbits.evaluate import distribution

        studied = distribution.study(source, text, samples, seq_len)
    if (path / IDENTITY).is_file():
        if log is not None:
            raise RequestError(f"--log {log} is for a run of quantize; {path} is a comparison and keeps its own times")
        made = comparison(path, studied)
    else:
        made = checkpoint(path, studied, log)
    html.write_text(made, encoding="utf-8")
    stderr(f"{html}: {human(len(made))}")
    if as_json:
        emit({"html": str(html), "path": str(path), "size_bytes": html.stat().st_size})


def checkpoint(path: Path, studied: dict[str, Any] | None, log: Path | None = None) -> str:
    """The page of one run."""
    from fewbits.report import checkpoint as pages
    from fewbits.report import events

    plan = path / "fewbits_plan.yaml"
    if not plan.is_file():
        raise RequestError(f"{path} has no {plan.name}; give what `fewbits quantize` or `fewbits compare` wrote")
    run = {"path": path, "events": events.read(path), "plan": plan.read_text(encoding="utf-8")}
    return pages.page(run | {"distribution": studied, "timeline": timeline(log)})


def timeline(log: Path | None) -> list[dict[str, Any]]:
    """Lines of a log; RequestError when there is no such file."""
    from fewbits.cli.log import read

    if log is None:
        return []
    if not log.is_file():
        raise RequestError(f"no such file: {log}; `fewbits quantize --log FILE` writes one")
    return read(log)


def comparison(path: Path, studied: dict[str, Any] | None) -> str:
    """The page of a comparison, finished or not."""
    from fewbits import compare
    from fewbits.report import comparison as pages

    found = compare.known(path)
    if studied is not None:
        found["distribution"] = studied
    return pages.page(found | {"table": compare.rows(found)})
