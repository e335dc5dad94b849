"""``fewbits eval``: perplexity, KL divergence and top-1 agreement, each with a 95 % interval."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, console, emit, human, number
from fewbits.cli.progress import Progress
from fewbits.errors import RequestError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense or quantized checkpoint.")],
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text file, or a fetched text: wikitext2, wiki, c4, code.")
    ] = None,
    ctx: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows, from the start of the text.")] = 20,
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="The model it was made from: adds KL and top-1.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="What both models compute in; default float32.")] = None,
    batch: Annotated[int, typer.Option(help="Windows at a time.")] = 1,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="G",
            help="MODEL reads keys and values of few bits: int8, int4, int2, fp8; none. Default: what MODEL says.",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Who computes MODEL: fewbits; for a .gguf file also llama.cpp, or fewbits-q8.")
    ] = "fewbits",
    tasks: Annotated[
        str | None,
        typer.Option(metavar="T,T,...", help="Tasks through lm-eval: its names, its .yaml, or .jsonl of questions."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model on a text, and its distance from the model that it was made from.

    [bold]Examples[/bold]

        fewbits eval ./smollm2-int4 --reference ./smollm2

        fewbits eval ./out --text held-out.txt --ctx 1024 --windows 5 --json

        fewbits eval model-q4_k_m.gguf --reference ./model --engine llama.cpp

        fewbits eval ./out --tasks questions.jsonl,arc_easy --reference ./smollm2

    With --tasks a text is scored only if --text names one.
    """
    from fewbits.evaluate import evaluate

    asked = answers(model, reference, tasks, (limit, shots, batch, dtype))
    if asked and text is None:
        if as_json:
            emit({"model": model, "reference": reference} | asked)
        return
    with Progress("evaluating", "window", "windows") as progress:
        how = (model, text, ctx, windows, reference, dtype, batch, kv_cache, progress, engine)
        found = evaluate(*how).to_json()
    report(found)
    if as_json:
        emit(found | asked)


def answers(model: str, reference: str | None, tasks: str | None, how: tuple[Any, ...]) -> dict[str, Any]:
    """``tasks`` and, with a reference, ``reference_tasks``, shown as a table; nothing when none were asked for.

    ``how`` is (limit, shots, batch, dtype).
    """
    if tasks is None:
        if how[0] is not None or how[1] is not None:
            raise RequestError("--limit and --shots are for --tasks, which was not given; give --tasks, or leave them")
        return {}
    from fewbits.evaluate.tasks import tasks as measure

    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints; stdout is for the JSON
        found["tasks"] = measure(model, tasks.split(","), *how)
        if reference is not None:
            found["reference_tasks"] = measure(reference, tasks.split(","), *how)
    show(model, reference, found)
    return found


def show(model: str, reference: str | None, found: dict[str, Any]) -> None:
    """A table: task, metric, one column per model."""
    from rich.table import Table

    table = Table()
    table.add_column("task")
    table.add_column("metric")
    table.add_column(model, justify="right")
    if reference is not None:
        table.add_column(reference, justify="right")
    for task, scores in found["tasks"].items():
        for metric in scores:
            if metric == "samples" or "stderr" in metric:
                continue
            other = found.get("reference_tasks", {}).get(task, {})
            both = [(x.get(metric), x.get(f"{metric}_stderr")) for x in ((scores, other) if other else (scores,))]
            table.add_row(task, metric, *(f"{number(v)} ± {number(e)}" for v, e in both))
    console().print(table)


def report(found: dict[str, Any]) -> None:
    """A table: figure, value, 95 % interval."""
    from rich.table import Table

    table = Table(
        title=f"{found['model']}: {found['windows']} windows of {found['ctx']} tokens of {found['text']}",
        title_justify="left",
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for key, name, digits in (
        ("perplexity", "perplexity", 4),
        ("reference_perplexity", "perplexity of the reference", 4),
        ("kl_mean", "KL(reference || model), mean", 5),
        ("kl_p99", "KL, 99th percentile", 4),
        ("top1", "top-1 agreement", 4),
    ):
        if found.get(key) is not None:
            low_high = found.get(f"{key}_ci95")
            table.add_row(
                name, number(found[key], digits), " .. ".join(number(x, digits) for x in low_high) if low_high else ""
            )
    table.add_row("bits per weight (linear layers)", number(found["bits_per_weight"], 3), "")
    if found["kv_cache"]:
        sizes = (found["kv_bytes_per_token"], found["kv_bytes_per_token_16bit"])
        table.add_row(f"{found['kv_cache']} KV cache, bytes per token", "{:.0f} (16 bits: {:.0f})".format(*sizes), "")
    table.add_row("size", human(found["size_bytes"]), "")
    console().print(table)
