"""Measuring a model: perplexity on its own, and its distance from the model that it was made from."""

import sys
import types
from typing import Any

from fewbits.evaluate.api import evaluate
from fewbits.evaluate.base import Evaluation
from fewbits.evaluate.census import Census, ModuleBits, census

__all__ = ["Census", "Evaluation", "ModuleBits", "census", "evaluate"]


class _Callable(types.ModuleType):
    """``fewbits.evaluate`` is this package and, among the public names, the function: neither may hide the other."""

    def __call__(self, *args: Any, **kwargs: Any) -> Evaluation:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
