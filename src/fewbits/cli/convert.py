"""``fewbits convert``: from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, choice, emit, human, size, stderr
from fewbits.errors import RequestError


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A transformers directory, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .gguf file to make, or a directory.")],
    format: Annotated[str | None, typer.Option(help="gguf or transformers; default: what OUT's name says.")] = None,
    type: Annotated[
        str, typer.Option(help="GGUF: f16, bf16, f32, q8_0, q4_k_m ...; transformers: f16, bf16 or f32.")
    ] = "f16",
    imatrix: Annotated[Path | None, typer.Option(help="llama.cpp's importance matrix for the searches.")] = None,
    split: Annotated[str | None, typer.Option(metavar="SIZE", help="Several GGUF files of at most this size.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it exists.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a transformers directory to GGUF (what llama.cpp's converter and quantizer make of it), or back.

    Exact for f32, and for f16 and bf16 when the weights have that dtype already; rounding to nearest otherwise.

    [bold]Examples[/bold]

        fewbits convert ./smollm2 smollm2-q4_k_m.gguf --type q4_k_m

        fewbits convert model.gguf ./model
    """
    wanted = choice(format or ("gguf" if out.suffix == ".gguf" else "transformers"), ("gguf", "transformers"), "format")
    if out.exists() and not overwrite:
        raise RequestError(f"{out} exists; choose another output, or give --overwrite to replace it")
    stderr(f"converting {src} ...")
    if wanted == "gguf":
        paths, exact = to_gguf(src, out, (type, imatrix, size(split, "--split")))
    else:
        paths, exact = to_transformers(src, out, type)
    total = sum(p.stat().st_size for p in paths)
    found: dict[str, Any] = {"out": str(out), "format": wanted, "type": type, "size_bytes": total, "exact": exact}
    stderr(f"{out}: {human(total)}, {'exact' if exact else 'rounded'}")
    if as_json:
        emit(found)


def to_gguf(src: str, out: Path, how: tuple[str, Path | None, int | None]) -> tuple[list[Path], bool]:
    """The files written, and whether every weight kept its value."""
    from fewbits.formats import gguf_imatrix, gguf_mixtures, gguf_model
    from fewbits.model import locate
    from fewbits.storage import Checkpoint

    kind, imatrix, split = how
    choice(kind, gguf_mixtures.MIXTURES, "type")
    folder = locate.directory(src)
    if "quantization_config" in gguf_model.read_config(folder):
        raise RequestError(f"{src} is already quantized; give the original model")
    importance = gguf_imatrix.read(imatrix).mean_squares() if imatrix else None
    checkpoint = Checkpoint.open(folder)
    export = gguf_model.prepare(folder, [checkpoint], kind, importance, title=folder.resolve().name)
    exact = all(gguf_model.keeps(checkpoint.dtype(i.name), i.info.kind) for i in export.items)
    return export.write(out, split), exact


def to_transformers(src: str, out: Path, kind: str) -> tuple[list[Path], bool]:
    """Likewise."""
    import shutil

    import torch

    from fewbits.formats import gguf, gguf_import

    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    choice(kind, dtypes, "type")
    if Path(src).suffix != ".gguf":
        raise RequestError(f"{src} is not a .gguf file; give one, or --format gguf to make one")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        gguf_import.convert(src, partial, dtypes[kind])
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    stored = {i.kind for i in gguf.read(src).infos.values()}
    return sorted(p for p in out.iterdir() if p.is_file()), stored <= {kind} or kind == "f32"
