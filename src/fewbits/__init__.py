"""Quantization of language models: every method is a choice on five independent axes."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fewbits.runtime import hook as _hook

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewbits.api import quantize
    from fewbits.evaluate import evaluate
    from fewbits.plan import Plan, Recipe, Tune
    from fewbits.runtime import load

__all__ = ["Plan", "Recipe", "Tune", "__version__", "evaluate", "load", "quantize"]

_HOMES = {
    "quantize": "fewbits.api",
    "load": "fewbits.runtime",
    "evaluate": "fewbits.evaluate",
    "Plan": "fewbits.plan",
    "Recipe": "fewbits.plan",
    "Tune": "fewbits.plan",
}


class _Evaluate(ModuleType):
    """``fewbits.evaluate`` is a package and, to its users, a function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.evaluate(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "evaluate" and type(value) is ModuleType:  # the import system binds a subpackage when it is imported
            value.__class__ = _Evaluate
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = importlib.import_module(_HOMES[name])
    return home if name == "evaluate" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


sys.modules[__name__].__class__ = _Package
_hook.install()
