"""Pages that show what was measured: one self-contained file each, no scripts, nothing loaded from elsewhere."""

from fewbits.report.outliers import layers, page, picture, table

__all__ = ["layers", "page", "picture", "table"]
