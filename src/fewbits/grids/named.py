"""Grids by name, for recipes and the command line: every named grid is one line."""

from __future__ import annotations

from fewbits.grids.base import Grid
from fewbits.grids.table import Table
from fewbits.grids.vectorwise import Vectorwise

NAMED_GRIDS: dict[str, Grid] = {
    "nf4": Table("nf4", 64),
    "nf4-dq": Table("nf4", 64, nested=True),
    "fp4-bnb": Table("fp4", 64),
    "fp4-bnb-dq": Table("fp4", 64, nested=True),
    "llm-int8": Vectorwise(),
}
