"""The JSON document: made as it goes, so that nothing measured is lost.

``rows`` holds a row for each case (:func:`harness.measure.measure`), everything else says where it was measured.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

Document = dict[str, Any]
Row = dict[str, Any]

OURS = "flashpte"
AOTI = "flashpte aoti"


def is_peer(label: str) -> bool:
    return not label.startswith(OURS)


def new_document(ceilings: dict[str, float]) -> Document:
    """An empty document of this machine."""
    import torch
    import triton

    versions: dict[str, str | None] = {"torch": torch.__version__, "triton": triton.__version__}
    for name in ("executorch", "flashinfer-python"):
        versions[name] = _version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": versions,
        "ceilings": ceilings,
        "prepare": {},
        "rows": [],
        "left_out": [],
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(document: Document, path: Path | None) -> None:
    """Writes the document, the old one staying whole until the new one is."""
    if path is not None:
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(path)


def load(path: Path) -> Document:
    """A document that was saved."""
    document: Document = json.loads(path.read_text())
    return document


def put(document: Document, row: Row) -> None:
    """Adds a row, in place of an earlier one of its case."""
    rows = document["rows"]
    rows[:] = [other for other in rows if not same_case(other, row)] + [row]


def same_case(a: Row, b: Row) -> bool:
    return (a["suite"], a["case"]) == (b["suite"], b["case"])


def time_of(row: Row, label: str, mode: str = "graph") -> float | None:
    """Microseconds of a runner, ``None`` where it has none."""
    time: float | None = row["times"].get(label, {}).get(mode)
    return time


def ours(row: Row) -> float | None:
    """Microseconds of our operator with its share of the map, which all layers of a mask have in common."""
    time = time_of(row, OURS)
    return None if time is None else time + row.get("map", {}).get(OURS, 0.0) / row["layers"]


def ours_plain(row: Row) -> tuple[float, str] | None:
    """Microseconds of a plain launch and what was launched: the compiled program's where it was measured."""
    share = row.get("map", {}).get(OURS, 0.0) / row["layers"]
    for label in (AOTI, OURS):
        time = time_of(row, label, "plain")
        if time is not None:
            return time + share, label
    return None


def best_peer(row: Row, mode: str = "graph", only: tuple[str, ...] | None = None) -> tuple[float, str] | None:
    """Microseconds and name of the fastest peer, or of the fastest of ``only``."""
    found = [
        (time, label)
        for label in row["times"]
        if is_peer(label) and (only is None or label in only) and (time := time_of(row, label, mode)) is not None
    ]
    return min(found, default=None)


def differences(a: Document, b: Document) -> list[tuple[float, str, str]]:
    """Relative differences of two documents' times by CUDA graph, largest first, with case and runner."""
    found = []
    for row in a["rows"]:
        for other in b["rows"]:
            if not same_case(row, other):
                continue
            for label in row["times"]:
                one, two = time_of(row, label), time_of(other, label)
                if one is not None and two is not None:
                    found.append((abs(two / one - 1), f"{row['suite']} {row['case']}", label))
    return sorted(found, reverse=True)
