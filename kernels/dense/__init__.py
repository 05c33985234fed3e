"""Linear layers with 16-bit weights and few rows of x: decode and verify."""

from flashpte.kernels.dense.ops import few_rows_linear
from flashpte.kernels.dense.tuning import MAX_ROWS

__all__ = ["MAX_ROWS", "few_rows_linear"]
