"""What every verb shares: the two output streams, errors as one line, sizes, and common options."""

from __future__ import annotations

import difflib
import errno
import json
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.errors import FewbitsError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of stdout; the rest goes to stderr.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line per tensor.")]
Tuned = Annotated[
    bool, typer.Option("--tune", help="Learn rounding and steps per block after the method (AutoRound); slow.")
]
TuneSteps = Annotated[int | None, typer.Option(metavar="N", help="Steps of --tune for each block; default 200.")]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def console() -> Console:
    """Where people read: stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stderr(line: str) -> None:
    """One plain line on stderr, never wrapped."""
    print(line, file=sys.stderr, flush=True)


def emit(result: dict[str, Any]) -> None:
    """The JSON object of ``--json``, as the last line of stdout."""
    print(json.dumps(result, default=str), flush=True)


def explain(e: BaseException) -> tuple[str, int]:
    """(one line, exit code) for an exception."""
    if isinstance(e, FewbitsError):
        return _one_line(str(e)), e.exit_code
    if hasattr(e, "format_message"):  # typer's usage errors, whichever click they come from
        return _one_line(e.format_message()), 2
    if isinstance(e, typer.Exit):
        return "", e.exit_code
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return f"disk full{_where(e)}; free space or write to another disk", 1
    if isinstance(e, OSError):
        return _one_line(f"{e.strerror or e}{_where(e)}"), 1
    if isinstance(e, MemoryError):
        return "out of memory; give --max-memory, a smaller --seq-len or fewer --samples", 1
    return _one_line(f"unexpected {type(e).__name__}: {e} (run again with --debug for the traceback)"), 1


def _where(e: OSError) -> str:
    return f": {e.filename}" if e.filename else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def interrupted(argv: list[str]) -> str:
    """What to say after Ctrl-C."""
    again = {"quantize": "the last finished block", "finetune": "the last checkpoint"}.get("".join(argv[:1]))
    if again is None or "--dry-run" in argv:
        return "interrupted"
    return f"interrupted; the same command with --resume goes on from {again}"


def lower(value: str | None) -> str | None:
    """A callback of options that name methods and types: llama.cpp writes its own in capitals."""
    return None if value is None else value.lower()


def tuned(wanted: bool, steps: int | None) -> Any:
    """What ``--tune`` and ``--tune-steps`` ask for."""
    from fewbits.plan import Tune

    return wanted if steps is None else Tune(steps)


def choice(value: str, allowed: Iterable[str], what: str) -> str:
    """``value`` when it is allowed; else RequestError with the allowed values and the nearest one."""
    names = sorted(allowed)
    if value in names:
        return value
    near = difflib.get_close_matches(value.lower(), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RequestError(f"unknown {what} {value!r}; allowed: {', '.join(names)}{hint}")


def size(text: str | None, option: str) -> int | None:
    """Bytes of ``4GiB``, ``500MB``, ``1.5g`` or ``1000``; RequestError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise RequestError(f"{option} {text!r} is not a size; give bytes or a unit, as in 4GiB or 500MB")
    return int(float(found[1]) * _UNITS[found[2]])


def human(count: float | None) -> str:
    """Bytes for people: ``89.6 MB``."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def number(value: float | None, digits: int = 4) -> str:
    """A figure for a table; a dash for what was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"
