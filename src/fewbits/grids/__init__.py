"""Grids: the numbers that a weight may become."""

from fewbits.grids.base import Grid, Params, group_index, groups_of, spread
from fewbits.grids.named import NAMED_GRIDS
from fewbits.grids.table import Table
from fewbits.grids.uniform import Int, clip_ratios
from fewbits.grids.vectorwise import Vectorwise

__all__ = [
    "NAMED_GRIDS",
    "Grid",
    "Int",
    "Params",
    "Table",
    "Vectorwise",
    "clip_ratios",
    "group_index",
    "groups_of",
    "spread",
]
