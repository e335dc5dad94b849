"""What a comparison compares: one cell per method, bits and format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fewbits import methods
from fewbits.errors import RequestError
from fewbits.pipeline import mixture


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


def _grid(name: str) -> Any:
    return methods.method(name).grid
