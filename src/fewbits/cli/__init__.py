"""The command line: one verb per file; each parses, calls the library and prints."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from fewbits.cli import (
    bench,
    compare,
    convert,
    evaluate,
    fetch,
    finetune,
    generate,
    inspect,
    merge,
    plan,
    quantize,
    report,
)
from fewbits.cli.base import explain, interrupted, stderr
from fewbits.runtime import lean

app = typer.Typer(
    name="fewbits",
    help="Make language models small: quantize, measure, inspect and run them.",
    epilog="Exit codes: 0 done, 1 failed, 2 the request is wrong, 3 a quality limit was not met.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
DISTRIBUTED = {"finetune"}
"""Verbs that need all of torch."""
VERBS: dict[str, Callable[..., None]] = {
    "fetch": fetch.command,
    "quantize": quantize.command,
    "eval": evaluate.command,
    "bench": bench.command,
    "compare": compare.command,
    "report": report.command,
    "inspect": inspect.command,
    "convert": convert.command,
    "finetune": finetune.command,
    "merge": merge.command,
    "generate": generate.command,
    "plan": plan.command,
}
for _verb, _command in VERBS.items():
    app.command(_verb)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from fewbits import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; every failure is one line on stderr unless ``--debug`` is given."""
    given = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv is None and given[0] not in DISTRIBUTED:  # a process of our own
        lean.spare()
        if given[0] == "generate":
            lean.spare_meta()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars fill log files
    try:
        code = app(args=given, prog_name="fewbits", standalone_mode=False)
        if code == INTERRUPTED:  # what newer versions of typer make of Ctrl-C; older ones raise Abort
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        stderr(interrupted(given))
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except Exception as e:
        if "--debug" in given:
            traceback.print_exc()
        message, code = explain(e)
        if message:
            stderr(f"error: {message}")
        return code
    finally:
        if argv is None:
            gc.freeze()  # else the interpreter looks for cycles among all objects of transformers when it ends
