"""Formats tables as lines of text with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def table_lines(rows: Sequence[Sequence[str]], *, ragged: bool = False) -> list[str]:
    """Aligns the first column left and the others right; with ``ragged`` the last column is not padded."""
    aligned = len(rows[0]) - ragged
    widths = [max(len(row[i]) for row in rows) for i in range(aligned)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:aligned], widths[1:], strict=True)),
                *row[aligned:],
            ]
        ).rstrip()
        for row in rows
    ]
