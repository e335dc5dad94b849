"""``fewbits finetune``: adapters on a frozen model of few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, choice, console, emit, human, lower, size, stderr
from fewbits.cli.progress import Progress


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A dense or quantized model: directory, hub id, .gguf.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the adapter to make.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help=".jsonl, .parquet or text; a fetched text: c4, wiki, code; hub:OWNER/NAME\\[@CONFIG][:SPLIT].",
        ),
    ],
    method: Annotated[
        str, typer.Option(help="qlora, lora: adapters on a base of few bits, or dense; qat: all weights.")
    ] = "qlora",
    grid: Annotated[
        str, typer.Option(help="Numbers of the base, or of qat: nf4-dq, int4 ...; for qat also ternary.")
    ] = "nf4-dq",
    base_method: Annotated[
        str, typer.Option(callback=lower, help="qlora: how the base is rounded: rtn, or gptq, calibrated on FILE.")
    ] = "rtn",
    r: Annotated[int, typer.Option("--r", "--rank", help="Rank of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option(help="Adapters are scaled by alpha / r.")] = 16,
    dropout: Annotated[float, typer.Option(help="Share of the adapters' inputs left out.")] = 0.05,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(r).")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Learn the norm of every row too (slower).")] = False,
    init: Annotated[
        str, typer.Option(help="Adapters at first: zero, or residual: the best part of what rounding lost (LoftQ).")
    ] = "zero",
    targets: Annotated[
        str, typer.Option(help="Layers with adapters: all-linear, or names as q_proj,v_proj.")
    ] = "all-linear",
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    packing: Annotated[bool, typer.Option("--packing/--no-packing", help="Several examples in a row.")] = True,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut examples that are longer than a row.")] = False,
    prompts: Annotated[bool, typer.Option("--prompts", help="Learn prompts too, not completions only.")] = False,
    group_size: Annotated[int | None, typer.Option(help="qat: columns that share a scale.")] = None,
    activations: Annotated[
        str | None, typer.Option(metavar="G", help="qat: quantize inputs too: int8, int8-static, fp8, nvfp4, ...")
    ] = None,
    format: Annotated[str, typer.Option(help="qat: fewbits, compressed-tensors, gptq, ...")] = "fewbits",
    distill: Annotated[
        bool, typer.Option("--distill/--no-distill", help="qat: learn from the original model, or from the text.")
    ] = True,
    steps: Annotated[int | None, typer.Option(help="Steps in place of --epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    schedule: Annotated[str, typer.Option(help="constant, cosine or linear, after the warmup.")] = "constant",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it; 0: never.")] = 0.3,
    optimizer: Annotated[str, typer.Option(help="adamw, paged-adamw (states on disk), paged-adamw-8bit.")] = "adamw",
    optimizer_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="States that paged optimizers keep in memory: 500MB.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations: less memory, slower.")
    ] = True,
    keep_products: Annotated[
        bool | None,
        typer.Option(
            "--keep-products/--no-keep-products",
            help="Recompute all but the outputs of adapted layers: faster, more memory; default: without a GPU.",
        ),
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of adapters, order and dropout.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Computed in: float32, bfloat16; default: the faster here.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it exists.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train low-rank adapters on a quantized model (QLoRA), or a quantized model itself (--method qat).

    The adapter is peft's and loads with plain peft. A dense SRC is rounded to --grid first, into OUT/base. With qat OUT
    is a checkpoint. OUT/log.jsonl gets a line per step.

    [bold]Examples[/bold]

        fewbits finetune ./smollm2 ./tuned --data chats.jsonl

        fewbits finetune ./smollm2-int4 ./tuned --data code.txt --r 64 --steps 200

        fewbits finetune ./model ./tuned --data hub:org/chats:train[:1000]

        fewbits finetune ./model ./tuned --data d.jsonl --optimizer paged-adamw --optimizer-memory 200MB

        fewbits finetune ./model ./int3 --method qat --grid int3 --data self --steps 300 --lr 2e-5

        fewbits finetune ./model ./w4a8 --method qat --grid int4 --activations int8 --data wiki --steps 300 --lr 2e-5

        torchrun --nproc-per-node 2 -m fewbits finetune ./model ./tuned --data d.jsonl

    An interrupted run goes on with the same command and --resume.
    """
    from fewbits.activations import preset
    from fewbits.finetune import Adapter, Qat, Rows, Training, finetune, ranks
    from fewbits.grids import NAMED_GRIDS

    choice(grid, [*NAMED_GRIDS, *(["ternary"] if method == "qat" else [])], "grid")
    memory = size(optimizer_memory, "--optimizer-memory")
    adapter = Adapter(r, alpha, dropout, rslora, dora, tuple(t.strip() for t in targets.split(",")), init)
    rows = Rows(seq_len, packing, truncate, prompts)
    training = Training(
        steps, epochs, batch, accumulate, lr, schedule, warmup, weight_decay, max_grad_norm, optimizer, memory,
        checkpointing, save_steps, seed, keep_products,
    )  # fmt: skip
    with Progress("training", "step", "steps") as progress:
        result = finetune(
            src,
            out,
            data,
            method=method,
            grid=grid,
            base_method=base_method,
            adapter=adapter,
            rows=rows,
            training=training,
            qat=Qat(group_size, format, distill, None if activations is None else preset(activations)),
            dtype=dtype,
            resume=resume,
            overwrite=overwrite,
            on_event=progress,
        )
    if not ranks.first():
        return
    report(result.to_json())
    if as_json:
        emit(result.to_json())


def report(found: dict[str, Any]) -> None:
    """The summary for people on stderr."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("result", found["out"]),
        ("base", found["base"]),
        ("steps", str(found["steps"])),
        ("loss, first and last step", f"{found['loss_first']:.4f} .. {found['loss']:.4f}"),
        ("trainable parameters", f"{found['trainable']:,}"),
        ("seconds per step", f"{found['step_seconds']:.3g}"),
        ("peak memory", human(found["peak_rss_bytes"])),
    ):
        table.add_row(name, value)
    console().print(table)
    if found["method"] != "qat":
        stderr(f"use it: fewbits merge {found['out']} OUT, or peft's PeftModel.from_pretrained")
