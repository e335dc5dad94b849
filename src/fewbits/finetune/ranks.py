"""Several processes that train one model, each on rows of its own: started by torchrun or accelerate launch.

They are told apart by the environment that these set. The first one makes directories and speaks; all hold the same
parameters. A process that fails is noticed by the launcher, which ends the others.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def several() -> bool:
    """Whether there are others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether this is the one that writes files and speaks."""
    return rank() == 0


def wait() -> None:
    """Until every process is here."""
    if several():
        _state().wait_for_everyone()


def of_first(value: T) -> T:
    """The first process's ``value``, everywhere."""
    if not several():
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    found = [value]
    broadcast_object_list(found)
    return found[0]


def _state() -> Any:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())
