"""Grids by name, for recipes and the command line: every named grid is one line."""

from __future__ import annotations

from fewbits.grids.base import Grid
from fewbits.grids.minifloat import Float
from fewbits.grids.table import Table
from fewbits.grids.uniform import Int
from fewbits.grids.vectorwise import Vectorwise
from fewbits.grids.wide import Int16

MX, NV = {"group": 32, "scale": "e8m0"}, {"group": 16, "scale": "e4m3"}

NAMED_GRIDS: dict[str, Grid] = {
    **{f"int{bits}": Int(bits, 128) for bits in range(2, 9)},
    "int16": Int16(),
    "fp8": Float("e4m3"),
    "fp8-e5m2": Float("e5m2"),
    "fp8-block": Float("e4m3", 128, 128),
    "fp8-tensor": Float("e4m3", -1, -1),
    "mxfp8": Float("e4m3", **MX),  # type: ignore[arg-type]
    "mxfp8-e5m2": Float("e5m2", **MX),  # type: ignore[arg-type]
    "mxfp6": Float("e2m3", **MX),  # type: ignore[arg-type]
    "mxfp6-e3m2": Float("e3m2", **MX),  # type: ignore[arg-type]
    "mxfp4": Float("e2m1", **MX),  # type: ignore[arg-type]
    "nvfp4": Float("e2m1", **NV),  # type: ignore[arg-type]
    "fp4-e2m1": Float("e2m1", 64),
    "fp4-e3m0": Float("e3m0", 64),
    "nf4": Table("nf4", 64),
    "nf4-dq": Table("nf4", 64, nested=True),
    "fp4-bnb": Table("fp4", 64),
    "fp4-bnb-dq": Table("fp4", 64, nested=True),
    "llm-int8": Vectorwise(),
}
