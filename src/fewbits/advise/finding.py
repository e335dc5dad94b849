"""What the doctor says: one finding per thing that is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """``kind`` in a word or two, the ``tensor`` (or file, or setting) that it concerns, and what is wrong with it."""

    kind: str
    tensor: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.tensor}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
