"""Several methods on one model: quantized from one calibration pass, measured on the same text, in one table."""

from fewbits.compare.cell import Cell, cells
from fewbits.compare.run import Comparison, Setting, known
from fewbits.compare.table import markdown, rows

__all__ = ["Cell", "Comparison", "Setting", "cells", "known", "markdown", "rows"]
