"""Running quantized models: the layer, loading, and the transformers plug-in. Imports nothing until it is asked to."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.runtime.linear import QuantLinear
    from fewbits.runtime.loading import load

__all__ = ["QuantLinear", "load"]

_HOMES = {"QuantLinear": "fewbits.runtime.linear", "load": "fewbits.runtime.loading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
