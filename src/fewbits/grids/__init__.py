"""Grids: the numbers that a weight may become."""

from fewbits.grids.base import Grid, Params, group_index, groups_of, spread, tied
from fewbits.grids.minifloat import Float
from fewbits.grids.named import NAMED_GRIDS
from fewbits.grids.uniform import Int, clip_ratios

__all__ = [
    "NAMED_GRIDS",
    "Float",
    "Grid",
    "Int",
    "Params",
    "clip_ratios",
    "group_index",
    "groups_of",
    "spread",
    "tied",
]
