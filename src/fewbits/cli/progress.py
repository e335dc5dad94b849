"""Events of the library as a progress bar with the time left, or as plain lines where stderr is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from fewbits.cli.base import console, stderr

_LINES = 10  # plain progress lines per run


class Progress:
    """Context manager; call it with events.

    ``key`` is the event that counts steps and ``total`` the field that says how many there are, both as the library
    names them. Events of other kinds: ``note`` is printed, ``tensor`` and ``tune`` are when ``verbose``; ``tuning``
    says how far a block is.
    """

    def __init__(self, title: str, key: str, total: str, verbose: bool = False):
        self.title, self.key, self.total, self.verbose = title, key, total, verbose
        self.console = console()
        self.started = time.perf_counter()
        self.stage: str | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == self.key:
            self._step(event)
        elif kind == "note":
            self._say(f"note: {event.get('message', '')}")
        elif kind == "tensor" and self.verbose:
            self._say(_tensor(event))
        elif kind == "tune" and self.verbose:
            self._say(f"  block {event['block']} tuned: output error {event['before']:.3e} -> {event['after']:.3e}")
        elif kind == "tuning" and self.console.is_terminal:
            self._draw(int(event["block"]), int(event["blocks"]), f"tuning {event['step']}/{event['steps']}")

    def _step(self, event: dict[str, Any]) -> None:
        # Blocks are numbered from 0 as they finish, windows are counted.
        done = int(event[self.key]) + (1 if self.key == "block" else 0)
        total = int(event.get(self.total) or done)
        stage = str(event.get("which", ""))
        if stage != self.stage:
            self._close()
            self.stage, self.started = stage, time.perf_counter()
        error = event.get("error")
        note = "" if error is None else f"error {float(error):.2e}"
        note = f"loss {event['loss']:.4f}" if "loss" in event else note
        if self.console.is_terminal:
            self._draw(done, total, note)
        elif done == total or done * _LINES // total != (done - 1) * _LINES // total:
            stderr(
                f"{self._label()}: {self.key} {done}/{total}, {_left(self.started, done, total)}{note and ', ' + note}"
            )

    def _draw(self, done: int, total: int, note: str) -> None:
        if self._bar is None:
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
            )
            self._bar = progress.Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self._label(), total=total, note=note)
        self._bar.update(self._task, completed=done, note=note)

    def _label(self) -> str:
        return f"{self.title} {self.stage}" if self.stage else self.title

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False)
        else:
            stderr(line)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _tensor(event: dict[str, Any]) -> str:
    bits, error = event.get("bits_per_weight"), event.get("error")
    facts = [f"{bits:.3f} bits" if bits is not None else "", f"error {error:.3e}" if error is not None else ""]
    return f"  {event.get('name', '?'):<56} {'  '.join(f for f in facts if f)}"


def _left(started: float, done: int, total: int) -> str:
    seconds = (time.perf_counter() - started) / max(done, 1) * (total - done)
    return f"{seconds:.0f} s left"
