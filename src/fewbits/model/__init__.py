"""Models: a source of blocks on transformers' own modules, tables of families, calibration text, pinned assets.

Modules of this package take each other from here; the order below is their order of dependence.
"""

from fewbits.model.assets import cache_dir, fetch, find_text
from fewbits.model.base import Family, Site, fold, get_weight, is_linear, is_transposed, set_weight
from fewbits.model.calibration import rows
from fewbits.model.experts import Expert, Experts, routed, unstack_experts
from fewbits.model.families import FAMILIES, find_family
from fewbits.model.names import Slot, match
from fewbits.model.shell import Shell
from fewbits.model.source import Source

__all__ = [
    "FAMILIES",
    "Expert",
    "Experts",
    "Family",
    "Shell",
    "Site",
    "Slot",
    "Source",
    "cache_dir",
    "fetch",
    "find_family",
    "find_text",
    "fold",
    "get_weight",
    "is_linear",
    "is_transposed",
    "match",
    "routed",
    "rows",
    "set_weight",
    "unstack_experts",
]
