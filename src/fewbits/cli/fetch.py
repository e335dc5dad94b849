"""``fewbits fetch``: pinned, hash-checked assets into a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.base import Debug, Json, emit, stderr


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m, calibration or wikitext2.")],
    source: Annotated[Path | None, typer.Option("--from", metavar="FILE", help="A copy that you already have.")] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", metavar="DIR", help="Where to keep it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again even if it is there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a small model or a text, pinned by version and sha256, and print where it is.

    [bold]Examples[/bold]

        fewbits fetch smollm2-135m

        fewbits fetch calibration

        fewbits fetch wikitext2 --from wiki.test.raw
    """
    from fewbits.model import assets

    stderr(f"fetching {name} ...")
    path = assets.fetch(name, cache_dir, force=force, source=source, convert=to_transformers)
    if as_json:
        emit({"name": name, "path": str(path)})
    else:
        print(path)


def to_transformers(file: Path, out: Path) -> None:
    """A GGUF file as a transformers directory, in float32: its blocks decode exactly in no 16-bit type."""
    import torch

    from fewbits.formats import gguf_import

    gguf_import.convert(file, out, torch.float32)
