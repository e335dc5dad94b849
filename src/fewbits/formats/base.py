"""What a layout is: how a quantized model lies on disk. The same file reads and writes it.

Layouts know names, bit positions and ``quantization_config``; they never choose a code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fewbits.activations import Activations
from fewbits.grids import Grid
from fewbits.tensor import Quantized


@dataclass(frozen=True)
class Entry:
    """One linear weight of the model as it is planned or found.

    ``name`` is the module's path in the checkpoint (``model.layers.0.self_attn.q_proj``), ``shape`` is ``(out, in)``,
    ``grid`` None means that the weight stays dense, ``scattered`` that groups are not consecutive columns (``g_idx``),
    ``residual`` names the kind of part that stays off the grid, if any; ``activations`` is what becomes of the inputs.
    """

    name: str
    shape: tuple[int, int]
    grid: Grid | None
    scattered: bool = False
    residual: str | None = None
    activations: Activations | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot store one entry."""

    name: str
    reason: str


class Layout(Protocol):
    """A checkpoint format. Instances are frozen; a reading instance holds the parsed ``quantization_config``."""

    name: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    """Last parts of tensor names that mark a module as quantized, e.g. ``{"qweight", "qzeros", "scales", "g_idx"}``."""

    scale_dtype: ClassVar[str | None]
    """Dtype in which the format's readers want scales; None means that of the model."""

    def check(self, entries: Sequence[Entry]) -> list[Refusal]:
        """Everything that cannot be stored, from shapes and grids alone, before any work."""
        ...

    def pack(self, name: str, q: Quantized) -> dict[str, Tensor]:
        """Tensors to store for module ``name``, by full tensor name (``f"{name}.qweight"``), contiguous, on CPU."""
        ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Inverse of :meth:`pack`; ``tensors`` by suffix (``qweight``). Raises CheckpointError on wrong shapes or
        values.
        """
        ...

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """``quantization_config`` for config.json; entries include those that stay dense (grid None)."""
        ...

    def files(self, entries: Sequence[Entry]) -> dict[str, str]:
        """Further text files of the format, by file name (GPTQ's ``quantize_config.json``)."""
        ...

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Layout:
        """A reading instance from ``quantization_config``; raises CheckpointError when it cannot be read, and says
        why.
        """
        ...
