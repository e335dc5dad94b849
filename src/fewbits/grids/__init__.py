"""Grids: the numbers that a weight may become."""

from fewbits.grids.base import Grid, Params, group_index, groups_of, spread
from fewbits.grids.kquant import TYPES as BLOCK_TYPES
from fewbits.grids.kquant import Block
from fewbits.grids.uniform import Int, clip_ratios

__all__ = ["BLOCK_TYPES", "Block", "Grid", "Int", "Params", "clip_ratios", "group_index", "groups_of", "spread"]
