"""Draws a profile as a bar chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flashpte.export.common.errors import ExportError, Option
from flashpte.export.runtime.kernel_families import FAMILIES
from flashpte.export.runtime.profile import ProfileReport

_COLOURS = {"attention": "#c8553d", "matmul": "#2d6a8e", "rest": "#9aa5b1", "idle": "#e9ecef"}


def require_matplotlib() -> None:
    """Checks that matplotlib is installed.

    Raises:
        ExportError: it is not; the text says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ExportError(Option("plot"), " needs matplotlib: pip install 'flashpte[plot]'") from error


def draw(report: ProfileReport, path: Path) -> None:
    """Draws one stacked bar per row of a report; see :func:`draw_beside`."""
    draw_beside({"": report}, path)


def draw_beside(reports: Mapping[str, ProfileReport], path: Path) -> None:
    """Draws several reports side by side: one panel per case, with one bar per report.

    Args:
        reports: reports by name, with the same cases.
        path: file to write; its suffix chooses the format.

    Raises:
        ExportError: matplotlib is missing, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row.case for report in reports.values() for row in report.rows))
    figure = Figure(figsize=(max(4.0, 2.4 * len(cases)), 3.6), layout="constrained")
    axes = figure.subplots(1, len(cases), squeeze=False)[0]
    for index, (axis, case) in enumerate(zip(axes, cases, strict=True)):
        for x, (_, report) in enumerate(reports.items()):
            row = next((row for row in report.rows if row.case == case), None)
            if row is None:
                continue
            bottom = 0.0
            for name, time in (*row.families_us.items(), ("idle", row.idle_us)):
                height = time / 1e3
                label = name if index == 0 and x == 0 else None
                axis.bar(x, height, bottom=bottom, color=_COLOURS[name], label=label, width=0.7)
                bottom += height
        axis.set_title(f"{case.name} {'+'.join(map(str, case.chunks))}\nat {case.context}", fontsize=9)
        axis.set_xticks(range(len(reports)), list(reports), rotation=30, ha="right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("milliseconds")
    figure.legend(loc="outside lower center", ncols=len(FAMILIES) + 1, fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ExportError(Option("plot", path), f" cannot be written: {error.strerror}") from error
