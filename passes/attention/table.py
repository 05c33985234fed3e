"""Reports as text for people: equal layers share a row, and reasons are notes below, so that 60 layers fit a screen."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from flashpte.passes.attention.report import NodeRoute, RoutingReport

WIDTH = 100
_RUNS = 2
"""How many runs of layers a row names."""

_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.|$)")


def _shape(sizes: tuple[int | str, ...]) -> str:
    return "x".join(str(s) for s in sizes)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _mask(route: NodeRoute) -> str:
    form = {"positions": " by positions", "tensor": ", mapped"}.get(route.mask_form, "")
    softcap = [f"softcap {route.softcap:g}"] if route.softcap else []
    return ", ".join([route.mask + form, *softcap, *(["sinks"] if route.sinks else [])])


def _place(route: NodeRoute) -> tuple[str, int | None]:
    """The path of a node with ``*`` for its first number, and the number."""
    path = route.module_path or route.node
    number = _NUMBER.search(path)
    return (path, None) if number is None else (f"{path[: number.start()]}*{path[number.end() :]}", int(number[1]))


def _runs(numbers: Sequence[int]) -> str:
    """``0-4 6-10 ...`` for ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:_RUNS]]
    return " ".join([*shown, *(["..."] if len(runs) > _RUNS else [])])


def _label(place: str, routes: Sequence[NodeRoute], alone: bool) -> str:
    """What a row calls its nodes. ``alone``: no other attention of the method is in a list of layers."""
    before, star, after = place.partition("*")
    if not star:
        return place if len(routes) == 1 else f"{place} x{len(routes)}"
    name = before.rstrip(".").rpartition(".")[2] or "modules"
    numbers = [number for route in routes if (number := _place(route)[1]) is not None]
    label = f"{name} {_runs(numbers)}" + ("" if alone else after)
    return f"{label} x{len(routes)}" if len(routes) > 1 else label


def format_table(reports: Mapping[str, RoutingReport]) -> str:
    """Renders reports (one per method) as text. Nodes that differ only in their layer share a row.

    Below a row are the bytes of one call that its nodes save and copy, together
    (:attr:`.NodeRoute.bytes_saved`, :attr:`.NodeRoute.bytes_copied`). Rows refer to the notes at the end by number.
    """
    header = ("attention", "query", "key", "mask", "kernel", "why")
    notes: dict[str, int] = {}
    rows: list[tuple[str, ...]] = []
    around: list[tuple[str, str]] = []  # the line before a row and the one after it
    for method, report in reports.items():
        groups: dict[tuple[str, ...], list[NodeRoute]] = {}
        for route in report.nodes:
            note = "; ".join(part for part in (route.reason, route.mask_note) if part)
            kernel = (route.op or "(left as it was)").removeprefix("flashpte::")
            cells = (_shape(route.query), _shape(route.key), _mask(route), kernel)
            groups.setdefault((_place(route)[0], *cells, note), []).append(route)
        numbered = {place for place, *_ in groups if "*" in place}
        for (place, *shown, note), routes in groups.items():
            number = notes.setdefault(note, len(notes) + 1)
            rows.append((_label(place, routes, len(numbered) < 2), *shown, f"[{number}]"))
            around.append((method, _costs(routes)))
            method = ""
    if not rows:
        return "no scaled_dot_product_attention node was found"
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    dashes = tuple("-" * width for width in widths)
    for row, (before, after) in zip([header, dashes, *rows], [("", ""), ("", ""), *around], strict=True):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines += [before] if before else []
        lines.append(("  " + "  ".join(padded)).rstrip())
        lines += [f"    {after}"] if after else []
    for note, number in notes.items():
        lines += textwrap.wrap(f"[{number}] {note}", WIDTH, subsequent_indent=" " * (len(str(number)) + 3))
    return "\n".join(lines)


def _costs(routes: Sequence[NodeRoute]) -> str:
    saved, copied = (sum(route.bytes_saved for route in routes), sum(route.bytes_copied for route in routes))
    users = max(route.map_users for route in routes)
    parts = [
        f"one map for {users}" if users else "",
        f"saves {_bytes(saved)}" if saved else "",
        f"copies {_bytes(copied)}" if copied else "",
    ]
    return ", ".join(filter(None, parts))
