"""``fewbits convert``: from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, choice, emit, human, lower, size, stderr
from fewbits.cli.progress import Progress
from fewbits.errors import RequestError


def command(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint, dense or quantized: a directory or a .gguf file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .gguf file to make, or a directory.")],
    format: Annotated[
        str | None,
        typer.Option(help="gguf, transformers (dense), imatrix, gptq, awq, compressed-tensors, bitsandbytes, fewbits."),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(callback=lower, help="GGUF: f16, bf16, f32, q8_0, q4_k_m ...; transformers: f16, bf16 or f32."),
    ] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Round what the new format cannot hold exactly.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of a quantized model: say what would be exact; write nothing.")
    ] = False,
    imatrix: Annotated[Path | None, typer.Option(help="llama.cpp's importance matrix for the searches.")] = None,
    calibration: Annotated[
        str, typer.Option(metavar="SPEC", help="imatrix: a text file, or a fetched text: c4, wiki, code.")
    ] = "c4",
    samples: Annotated[int, typer.Option(help="imatrix: rows of the text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="imatrix: tokens per row.")] = 512,
    split: Annotated[str | None, typer.Option(metavar="SIZE", help="Several GGUF files of at most this size.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it exists.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to another format; default: gguf or transformers, as OUT's name says.

    A dense model becomes GGUF (what llama.cpp's converter and quantizer make of it), and a .gguf file a dense one:
    exact for f32, and for f16 and bf16 when the weights have that dtype already.

    A quantized model keeps its numbers to the bit, wherever the new format has a grid that equals the old one; else it
    is refused, unless --lossy. As a dense model it is float32 unless --type says otherwise.

    [bold]Examples[/bold]

        fewbits convert ./smollm2 smollm2-q4_k_m.gguf --type q4_k_m

        fewbits convert model.gguf ./model

        fewbits convert ./model-gptq ./model-awq --format awq

        fewbits convert ./smollm2 imatrix.gguf --format imatrix --calibration wiki

    An importance matrix is llama.cpp's, in its old format when OUT ends in .dat; SRC may be one in the other format.
    """
    from fewbits.formats import LAYOUTS

    default = "gguf" if out.suffix == ".gguf" else "transformers"
    wanted = choice(format or default, (*LAYOUTS, "transformers", "imatrix"), "format")
    if out.exists() and not overwrite:
        raise RequestError(f"{out} exists; choose another output, or give --overwrite to replace it")
    stderr(f"converting {src} ...")
    if dry_run and (wanted == "imatrix" or not quantized(src, wanted)):
        raise RequestError(
            f"--dry-run given, but {src} is not quantized; use `fewbits plan {src} --method f16` or another type"
        )
    if wanted == "imatrix":
        found = to_imatrix(src, out, (calibration, samples, seq_len))
    elif quantized(src, wanted):
        found = carry_over(src, out, wanted, type, lossy, dry_run)
    else:
        paths, exact = (
            to_gguf(src, out, (type or "f16", imatrix, size(split, "--split")))
            if wanted == "gguf"
            else to_transformers(src, out, type or "f16")
        )
        total = sum(p.stat().st_size for p in paths)
        found = {"out": str(out), "format": wanted, "type": type or "f16", "size_bytes": total, "exact": exact}
    size_of = "not written" if dry_run else human(found["size_bytes"])
    stderr(f"{out}: {size_of}, {'exact' if found['exact'] else 'rounded'}")
    if as_json:
        emit(found)


def quantized(src: str, wanted: str) -> bool:
    """Whether weights carry their codes over: from a quantized directory, or from GGUF into another quantized format.

    A .gguf file as a dense model goes the old way, which also knows the types that are decoded only.
    """
    from fewbits.formats import gguf_model

    path = Path(src)
    if path.suffix == ".gguf" or (path.is_dir() and not any(path.glob("*.safetensors")) and any(path.glob("*.gguf"))):
        return wanted not in ("gguf", "transformers")
    if not (path / "config.json").is_file():
        return False
    carried = "quantization_config" in gguf_model.read_config(path)
    if not carried and wanted not in ("gguf", "transformers"):
        raise RequestError(f"{src} is not quantized; use `fewbits quantize {src} OUT --format {wanted}`")
    return carried


def carry_over(
    src: str, out: Path, wanted: str, kind: str | None, lossy: bool, dry_run: bool = False
) -> dict[str, Any]:
    """Codes and scales from one format to another; what happened, as JSON types."""
    import torch

    from fewbits.formats.convert import convert

    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    if kind is not None and wanted != "transformers":
        raise RequestError(f"--type {kind} given, but a quantized model keeps its own grids in {wanted}; drop --type")
    made = convert(src, out, wanted, dtypes[choice(kind or "f32", dtypes, "type")], lossy, dry_run).to_json()
    made |= {"dry_run": True} if dry_run else {}
    for line in made["notes"]:
        stderr(f"note: {line}")
    for grid, count in made["grids"].items():
        stderr(f"{count} weights exact as {grid}")
    if made["rounded"]:
        worst = max(made["rounded"], key=made["rounded"].get)
        stderr(f"{len(made['rounded'])} weights rounded, {worst} most: relative error {made['rounded'][worst]:.2e}")
    return dict(made)


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
    return export.write(out, split), all(i.exact for i in export.items)


def to_imatrix(src: str, out: Path, how: tuple[str, int, int]) -> dict[str, Any]:
    """Of a model, observed on (text, rows, tokens per row); or a matrix in llama.cpp's other format."""
    from fewbits.formats import gguf_imatrix
    from fewbits.pipeline.importance import observe

    if Path(src).is_file():
        found = gguf_imatrix.read(src)
    else:
        with Progress("observing", "block", "blocks") as progress:
            found = observe(src, *how, on_event=progress)
    found.write(out)
    facts = {"out": str(out), "format": "imatrix", "type": "imatrix"}
    return facts | {"size_bytes": out.stat().st_size, "exact": True}


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
