"""``fewbits inspect``: what a checkpoint holds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli.base import Debug, Json, Verbose, console, emit, human, number

if TYPE_CHECKING:
    from fewbits.evaluate import Census


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint directory or a .safetensors file.")],
    check: Annotated[
        bool, typer.Option("--check", help="Read every tensor: all codes in range, all numbers finite.")
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show formats, bits and sizes of a checkpoint without loading the model.

    [bold]Examples[/bold]

        fewbits inspect ./smollm2-int4

        fewbits inspect ./smollm2-int4 --check --json
    """
    from fewbits.evaluate import census

    found = census(path, check)
    report(found, verbose)
    if as_json:
        emit(found.to_json() | {"checked": check})


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
