"""One tiny checkpoint per family for the whole run of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewbits.model import Source
from tests.tiny import tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small lose more to threads that wait for each other than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of the tiny model of a family, made once."""
    made: dict[str, Path] = {}

    def path(family: str) -> Path:
        if family not in made:
            made[family] = tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return path


@pytest.fixture(scope="session")
def source(checkpoint: Callable[[str], Path]) -> Callable[[str], Source]:
    """An open source of the tiny model of a family."""
    opened: dict[str, Source] = {}

    def get(family: str) -> Source:
        if family not in opened:
            opened[family] = Source.open(checkpoint(family))
        return opened[family]

    return get
