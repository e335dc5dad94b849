"""Every error that fewbits raises on purpose.

FewbitsError                    exit 1  something went wrong; the message is one line
├── RequestError                exit 2  what was asked for cannot be done: value given, values allowed, next step
│   └── Refused                 exit 2  a layout cannot store what the plan asks for; names the tensors
├── CheckpointError             exit 1  a model's files are damaged: truncated, inconsistent, not finite
├── FetchError                  exit 1  an asset cannot be had: no network, wrong hash
└── QualityError                exit 3  the result is worse than the limit that the user set
"""

from __future__ import annotations

from collections.abc import Sequence


class FewbitsError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class RequestError(FewbitsError, ValueError):
    """The request is wrong. The message says what was given, what is allowed and what to do."""

    exit_code = 2


class Refused(RequestError):
    """A layout cannot store what the plan asks for; known before any work.

    ``reasons`` maps a reason to the tensors that it concerns.
    """

    def __init__(self, layout: str, reasons: dict[str, Sequence[str]]):
        self.layout, self.reasons = layout, reasons
        parts = [f"{why} ({_some(names)})" for why, names in reasons.items()]
        super().__init__(f"format {layout!r} cannot store this plan: " + "; ".join(parts))


class CheckpointError(FewbitsError):
    """A model's files are damaged."""


class FetchError(FewbitsError):
    """An asset cannot be fetched or is not the pinned one."""


class QualityError(FewbitsError):
    """The result misses a quality limit that the user set."""

    exit_code = 3


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
