"""``fewbits inspect``: what a checkpoint holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, Verbose, console, emit, human, number, stderr
from fewbits.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from fewbits.evaluate import Census


_NARROW = (0, 1, 4, 5, 8, 10)  # columns of the page's table that fit a terminal


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint directory or a .safetensors file.")],
    check: Annotated[
        bool, typer.Option("--check", help="Examine every tensor; say what is damaged, and who will load it.")
    ] = False,
    activations: Annotated[
        bool, typer.Option("--activations", help="Run a text through a dense model: outliers of every layer's input.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text file, or a fetched text: c4 (default), wiki, code, wikitext2."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of the text for --activations.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    sigmas: Annotated[float, typer.Option(help="Outliers are also counted above so many standard deviations.")] = 6.0,
    zeroing: Annotated[
        str | None,
        typer.Option(metavar="SHARES", help="Measure what zeroing these shares costs, as in 0.001,0.01 (slow)."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Rows of the text for --zeroing.")] = 4,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the study as one page.")] = None,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show formats, bits and sizes of a checkpoint without loading the model; with --activations, study its outliers.

    [bold]Examples[/bold]

        fewbits inspect ./smollm2-int4

        fewbits inspect ./smollm2-int4 --check --json

        fewbits inspect ./smollm2 --activations --zeroing 0.001,0.01 --html outliers.html
    """
    from fewbits.evaluate import census

    if not activations and (text is not None or zeroing is not None or html is not None):
        raise RequestError("--text, --zeroing and --html belong to the outlier study; give --activations too")
    shares = parse_shares(zeroing)
    if html is not None and not html.absolute().parent.is_dir():
        raise RequestError(f"--html {html}: no such directory; make {html.parent} first")
    examined = examine(path, as_json) if check else {}
    found = census(path)
    report(found, verbose)
    result = found.to_json() | {"checked": check} | examined
    if activations:
        result["activations"] = outliers(path, text, (samples, seq_len, windows), sigmas, shares)
        show(result["activations"], verbose, html)
    if as_json:
        emit(result)


def examine(path: str, as_json: bool) -> dict[str, Any]:
    """What the doctor says, on stderr and as JSON types. Raises CheckpointError when something is damaged."""
    from fewbits.advise.doctor import check

    found = check(path)
    result = found.to_json()
    for finding in found.findings:
        stderr(str(finding))
    for note in found.notes:
        stderr(f"note: {note}")
    for loader, verdict in found.loads.items():
        why = "; ".join(verdict.reasons) if verdict.reasons else verdict.needs
        stderr(f"{loader}: {'loads' if verdict.loads else 'does NOT load'}{f' ({why})' if why else ''}")
    if not found.healthy:
        if as_json:
            emit(result | {"checked": True})
        first, more = found.findings[0], len(found.findings) - 1
        raise CheckpointError(f"{path} is damaged: {first}{f' (and {more} more findings)' if more else ''}")
    return {k: result[k] for k in ("healthy", "findings", "notes", "loads")}


def parse_shares(given: str | None) -> list[float]:
    """``0.001,0.01`` as numbers; RequestError for anything else."""
    try:
        shares = [float(part) for part in given.split(",")] if given is not None else []
    except ValueError:
        shares = [0.0]
    if not all(0 < s < 1 for s in shares):
        raise RequestError(
            f"--zeroing {given!r} is not a list of shares; give numbers between 0 and 1, as in 0.001,0.01"
        )
    return shares


def outliers(
    path: str, text: str | None, rows: tuple[int, int, int], sigmas: float, shares: list[float]
) -> dict[str, Any]:
    """The study as JSON types; ``rows`` are samples, tokens per row, and windows of the zeroing experiment."""
    from fewbits.cli.progress import Progress
    from fewbits.evaluate.outliers import study
    from fewbits.evaluate.zeroing import zeroing

    samples, seq_len, windows = rows
    with Progress("observing", "block", "blocks") as progress:
        found = study(path, text, samples, seq_len, sigmas, progress)
    result: dict[str, Any] = {"model": path, "text": text or "c4", "samples": samples, "seq_len": seq_len}
    result |= {"sigmas": sigmas, "layers": [f.to_json() for f in found]}
    if shares:
        with Progress("zeroing", "case", "cases") as progress:
            cases = zeroing(path, shares, text, windows, seq_len, on_event=progress)
        result["zeroing"] = [z.to_json() for z in cases]
    return result


def show(study: Mapping[str, Any], verbose: bool, html: Path | None) -> None:
    """The inputs with the largest values (all with ``verbose``), the zeroing table, and the page."""
    from rich.table import Table

    from fewbits.report import layers, outlier_page, table

    by_size = dict(study) | {"layers": sorted(study["layers"], key=lambda x: -x["absmax"])[:8]}
    rows = [[row[i] for i in _NARROW] for row in layers(study if verbose else by_size)]
    for head, *rest in (rows, *([table(study)] if "zeroing" in study else [])):
        shown = Table(box=None, pad_edge=False)
        for i, name in enumerate(head):
            shown.add_column(name, overflow="fold", justify="right" if i else "left")
        for row in rest:
            shown.add_row(*row)
        console().print(shown)
    if html is not None:
        html.write_text(outlier_page(study), encoding="utf-8")
        console().print(f"page: {html}", markup=False)


def report(found: Census, verbose: bool) -> None:
    """Three tables: the whole, grids (modules with ``verbose``), stored dtypes."""
    from rich.table import Table

    out = console()
    out.print(f"{found.path}: {found.architecture or 'unknown architecture'}, format {found.format}", markup=False)
    out.print(
        f"{found.parameters / 1e6:.1f} M parameters, {human(found.size_bytes)}, "
        f"{number(found.bits_per_weight, 3)} bits per weight in {len(found.modules)} linear layers"
    )
    table = Table(
        "module" if verbose else "modules", "grid", "shape" if verbose else "weights", "bits", "size", box=None
    )
    if verbose:
        for m in found.modules:
            table.add_row(
                m.name, m.grid, " x ".join(map(str, m.shape)), number(m.bits_per_weight, 3), human(m.size_bytes)
            )
    else:
        for grid, count in Counter(m.grid for m in found.modules).items():
            same = [m for m in found.modules if m.grid == grid]
            weights = sum(m.parameters for m in same)
            bits = sum(m.bits_per_weight * m.parameters for m in same) / max(weights, 1)
            table.add_row(
                str(count), grid, f"{weights / 1e6:.1f} M", number(bits, 3), human(sum(m.size_bytes for m in same))
            )
    out.print(table)
    dtypes = Table("dtype", "tensors", "size", box=None)
    for dtype, (count, size) in sorted(found.dtypes.items()):
        dtypes.add_row(dtype, str(count), human(size))
    out.print(dtypes)
