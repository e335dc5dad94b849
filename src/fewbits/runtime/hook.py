"""Acts when a module of another package is imported and not before: ``import fewbits`` stays cheap."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Action = Callable[[], None]
QUANTIZERS = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    """Executes the module as its own loader does, between two actions."""

    def __init__(self, inner: Any, before: Action, after: Action):
        self._inner, self._before, self._after = inner, before, after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self._inner  # packages look into their own files through it
        self._before()
        self._inner.exec_module(module)
        self._after()


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the import of one module, once."""

    def __init__(self, target: str, before: Action, after: Action):
        self.target, self._actions = target, (before, after)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, *self._actions)
        return spec


def _nothing() -> None:
    pass


def around(target: str, before: Action = _nothing, after: Action = _nothing) -> bool:
    """Call ``before`` and ``after`` around the first import of ``target``; False when it is imported already."""
    if target in sys.modules:
        return False
    if not any(isinstance(f, _Finder) and f.target == target for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(target, before, after))
    return True


def install() -> None:
    """Register the plug-in now if transformers' quantizers are imported already, else as soon as they are."""
    if not around(QUANTIZERS, after=_register):
        _register()


def _register() -> None:
    importlib.import_module("fewbits.runtime.plugin")
