"""Pages that show what was measured: one self-contained file each, nothing loaded from elsewhere."""

from fewbits.report.outliers import layers, picture, table
from fewbits.report.outliers import page as outlier_page

__all__ = ["layers", "outlier_page", "picture", "table"]
