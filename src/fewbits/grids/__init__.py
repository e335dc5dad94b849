"""Grids: the numbers that a weight may become."""

from fewbits.grids.base import Grid, Params, group_index, groups_of, spread, tied
from fewbits.grids.bilevel import Bilevel
from fewbits.grids.kquant import TYPES as BLOCK_TYPES
from fewbits.grids.kquant import Block
from fewbits.grids.learned import Learned
from fewbits.grids.minifloat import Float
from fewbits.grids.named import NAMED_GRIDS
from fewbits.grids.table import Table
from fewbits.grids.uniform import Int, clip_ratios
from fewbits.grids.vectorwise import Vectorwise
from fewbits.grids.wide import Int16

__all__ = [
    "BLOCK_TYPES",
    "NAMED_GRIDS",
    "Bilevel",
    "Block",
    "Float",
    "Grid",
    "Int",
    "Int16",
    "Learned",
    "Params",
    "Table",
    "Vectorwise",
    "clip_ratios",
    "group_index",
    "groups_of",
    "spread",
    "tied",
]
