"""What a comparison compares: one cell per method, bits and format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fewbits import methods
from fewbits.errors import RequestError
from fewbits.grids import Int
from fewbits.pipeline import mixture

LEAST = 16
"""The smallest group that is tried."""


@dataclass(frozen=True)
class Cell:
    """One result: a method with its bits (None: the method has them fixed) and a format (None: where it is at home)."""

    method: str
    bits: int | None = None
    group_size: int | None = None
    format: str | None = None

    @property
    def name(self) -> str:
        """Its name in tables and on disk: ``gptq-4``, ``nf4``, ``awq-3-gptq``."""
        return "-".join(str(x) for x in (self.method, self.bits, self.format) if x is not None)

    def options(self) -> dict[str, Any]:
        """As :func:`fewbits.quantize` takes them."""
        return asdict(self)


def cells(
    names: Sequence[str],
    bits: Sequence[int] = (),
    formats: Sequence[str] = (),
    group_size: int | None = None,
) -> list[Cell]:
    """Every method at every number of bits in every format; once where a method has its bits fixed.

    Raises RequestError for an unknown method or one that is named twice.
    """
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None or not names:
        raise RequestError(f"methods {','.join(names)!r}: {'name some' if not names else f'{twice!r} is there twice'}")
    found = []
    for name in names:
        adjustable = set() if mixture.is_mixture(name) else {f.name for f in fields(_grid(name))}
        for b in bits if bits and "bits" in adjustable else (None,):
            for f in formats or (None,):
                found.append(Cell(name, b, group_size if "group" in adjustable else None, f))
    return found


def fitting(cell: Cell, columns: Iterable[int]) -> Cell:
    """``cell`` with groups that divide ``columns``, the widths of the model's weights.

    Most readers want whole groups of integers. Where the method's own group size, not one that was given, does not
    divide, it is halved until it does. Other grids have their blocks fixed, and say how edges are treated.
    """
    if cell.group_size is not None or mixture.is_mixture(cell.method) or not isinstance(_grid(cell.method), Int):
        return cell
    fits = group = _grid(cell.method).group
    while fits > LEAST and any(c % fits for c in columns):
        fits //= 2
    return cell if fits == group else replace(cell, group_size=fits)


def _grid(name: str) -> Any:
    return methods.method(name).grid
