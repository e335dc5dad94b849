"""A process that runs one command spares what torch and transformers import for others.

While it is imported, transformers tells torch's compiler how to treat some functions, imports a mode for masks made by
``vmap``, and names the classes of distributed tensors; torch's own functions on the meta device ask the compiler not to
trace them. That alone brings in the compiler, sympy and the distributed operators, a fifth of the time from nothing to
a first token. Here the compiler is told nothing and comes when something else is wanted of it; the distributed part is
absent, as in a torch that is built without it.

Another seventh: the losses of object detectors bring in scipy, and the sources of all of transformers' models are read
twice for the names in them. And as much again: torch describes in Python, with sympy at hand, what some hundred
operators do to tensors on the meta device; those that most models are built with are described in C++ as well.

Only the command line does this, in a process of its own: a library must leave torch as it is.
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from fewbits.runtime import hook

COMPILER, MASKS = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"
META = "torch._meta_registrations"
REMARKS = ("disable", "allow_in_graph", "assume_constant_result")
"""What the compiler is told about a function by decorating it."""


def spare() -> None:
    """From now on nothing is distributed in this process; call it before torch and transformers are imported.

    While torch is, the cyclic collector sleeps: it takes a tenth of that time to find that all of it is in use.
    """
    hook.around("torch", before=gc.disable, after=gc.enable)
    hook.around("transformers", before=_stand_in)
    hook.around("transformers.utils.import_utils", after=_read_once)
    hook.around("transformers.utils", after=_without_scipy)


def spare_meta() -> None:
    """From now on torch knows on the meta device only what it has in C++; call it before torch is imported.

    An operator that is missing raises NotImplementedError: then :func:`restore_meta`, and try again.
    """
    if "torch" not in sys.modules:
        sys.modules[META] = _Later(META)


def restore_meta() -> bool:
    """Torch's description of the other operators; False when it is there already."""
    if not isinstance(sys.modules.get(META), _Later):
        return False
    del sys.modules[META]
    importlib.import_module(META)
    return True


def _stand_in() -> None:
    import torch

    if COMPILER in sys.modules:
        return
    torch.distributed.is_available = _no
    for remark in REMARKS:
        setattr(torch.compiler, remark, _as_it_is)
    sys.modules[COMPILER] = torch._dynamo = _Compiler(COMPILER)
    sys.modules[MASKS] = _Masks(MASKS)
    sys.meta_path.insert(0, _Parts())


def _real(name: str) -> ModuleType:
    """The module itself, imported when the stand-ins have gone."""
    restore_meta()  # the compiler counts on it
    if isinstance(sys.modules.get(COMPILER), _Compiler):
        del sys.modules[COMPILER], sys.modules[MASKS], sys.modules["torch"]._dynamo
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Parts)]
    return importlib.import_module(name)


def _no() -> bool:
    return False


def _as_it_is(fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """The function, or a decorator that returns it; the rest says how to compile it."""
    return (lambda f: f) if fn is None else fn


def _read_once() -> None:
    """The names in a folder of transformers' are read and sorted once: ``transformers`` and ``transformers.models`` ask
    for those of the same folder.
    """
    utils: Any = importlib.import_module("transformers.utils.import_utils")
    read, sort = utils.create_import_structure_from_path, utils.spread_import_structure
    found: dict[str, Any] = {}
    ordered: dict[int, Any] = {}

    def read_once(path: str) -> Any:
        folder = os.path.dirname(path) if os.path.isfile(path) else str(path)
        if folder not in found:
            found[folder] = read(folder)
        return found[folder]

    def sort_once(names: Any) -> Any:
        if id(names) not in ordered:
            ordered[id(names)] = sort(names)
        return ordered[id(names)]

    utils.create_import_structure_from_path, utils.spread_import_structure = read_once, sort_once


def _without_scipy() -> None:
    """Only losses of detectors ask for it, of which fewbits has none."""
    sys.modules["transformers.utils"].is_scipy_available = _no  # type: ignore[attr-defined]


class _Compiler(ModuleType):
    """Takes remarks about functions and keeps none; anything else comes from the module that it stands for."""

    __path__: Sequence[str] = ()  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return _as_it_is if name in REMARKS else getattr(_real(self.__name__), name)


class _Later(ModuleType):
    """Imported when something in it is wanted."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        restore_meta()
        return getattr(sys.modules[self.__name__], name)


class _Masks(ModuleType):
    """Whatever is imported from it is a function that fetches the real one when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: getattr(_real(self.__name__), name)(*args, **kwargs)


class _Parts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module of the compiler after the compiler itself, and only once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{COMPILER}."):
            return None
        _real(fullname)
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass
