"""Results of the attention suites: made as they come, so that nothing measured is lost.

In memory a document has a row for each case (:func:`harness.measure.measure`) with the times of all runners. On disk
each suite is a file of flat rows, one for each runner of a case (:mod:`harness.schema`).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness import schema

Document = dict[str, Any]
Row = dict[str, Any]

OURS = "flashpte"
AOTI = "flashpte aoti"
ATTENTION_SUITES = ("decode", "verify", "prefill", "chunk", "other", "random", "grids", "head-dims")

# What a row is called in memory and in a file.
CASE_KEYS = {
    "case": "case",
    "topic": "topic",
    "shape_name": "shape",
    "length": "length",
    "rows": "query_rows",
    "context": "context",
    "window": "window",
    "batch": "batch",
    "layers": "layers",
    "floor": "floor_us",
    "flop": "flop",
    "kv_bytes": "kv_bytes",
    "lost": "lost",
}
TIME_KEYS = {
    "graph": "graph_us",
    "plain": "plain_us",
    "variant": "variant",
    "error": "error",
    "failed": "failed",
    "failed plain": "failed_plain",
}
SWEEP_KEYS = {
    "table": "table_us",
    "best": "best_us",
    "ratio": "ratio",
    "tried": "tried",
    "failed": "failed",
    "table tile": "table_tile",
    "best tile": "best_tile",
}
DEFAULTS = {"context": None, "window": None, "batch": 1, "layers": 1}


def is_peer(label: str) -> bool:
    return not label.startswith(OURS)


def here() -> dict[str, Any]:
    """Header of a result that is measured now, on this machine."""
    import torch
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    versions |= {name: _version(name) for name in ("executorch", "flashinfer-python")}
    return {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version for name, version in versions.items() if version is not None},
    }


def new_document(ceilings: dict[str, float]) -> Document:
    """An empty document of this machine."""
    return {**here(), "ceilings": ceilings, "rows": [], "left_out": [], "not_prepared": {}}


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _renamed(entry: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names[key]: value for key, value in entry.items() if key in names}


def flat_rows(row: Row) -> Iterator[Row]:
    """A case as a file holds it: a row for each runner, and for a sweep its outcome and its best tiles."""
    case = {key: value for key, value in _renamed(row, CASE_KEYS).items() if value != DEFAULTS.get(key, ())}
    case["layers"] = row["layers"]
    for label, entry in row["times"].items():
        map_us = row.get("map", {}).get(label)
        yield schema.flat_row(**case, runner=label, **_renamed(entry, TIME_KEYS), map_us=map_us)
    if "sweep" in row:
        yield schema.flat_row(**case, runner="tiles", **_renamed(row["sweep"], SWEEP_KEYS))
        for rank, found in enumerate(row["sweep"].get("first", []), 1):
            name = {key: case[key] for key in ("topic", "case") if key in case}
            yield schema.flat_row(**name, rank=rank, tile=found["tile"], graph_us=found["us"])


def nested_rows(suite: str, rows: Iterable[Row]) -> list[Row]:
    """The cases of a file."""
    found: dict[tuple[object, str], Row] = {}
    back = {flat: name for name, flat in CASE_KEYS.items()}
    for flat in rows:
        key = (flat.get("topic"), flat["case"])
        if "rank" in flat:
            found[key]["sweep"].setdefault("first", []).append({"tile": flat["tile"], "us": flat["graph_us"]})
            continue
        case = {name: flat.get(spelled, DEFAULTS.get(spelled)) for spelled, name in back.items()}
        absent = {name for name in ("topic", "lost", "flop", "kv_bytes") if case[name] is None}
        case = {name: value for name, value in case.items() if name not in absent}
        row = found.setdefault(key, {**case, "suite": suite, "live": case["context"] or case["length"], "times": {}})
        if flat["runner"] == "tiles":
            row["sweep"] = {name: flat[spelled] for name, spelled in SWEEP_KEYS.items() if spelled in flat}
            continue
        entry = {name: flat[spelled] for name, spelled in TIME_KEYS.items() if spelled in flat}
        if "graph" in entry or "plain" in entry:
            entry.setdefault("variant", "")
        row["times"][flat["runner"]] = entry
        if "map_us" in flat:
            row.setdefault("map", {})[flat["runner"]] = flat["map_us"]
    return list(found.values())


def files(document: Document) -> list[schema.ResultFile]:
    """The document as result files, one for each suite."""

    def of(suite: str, names: Iterable[str]) -> list[str]:
        return [name for name in names if name.split(": ")[-1].startswith(f"{suite} ")]

    left = [name.split(" ")[0] for name in document["left_out"]]
    found = []
    for suite in dict.fromkeys([*(row["suite"] for row in document["rows"]), *left]):
        rows = [flat for row in document["rows"] if row["suite"] == suite for flat in flat_rows(row)]
        reasons = document.get("not_prepared", {})
        header = {key: document[key] for key in ("versions", "ceilings", "arguments", "seconds") if key in document}
        header["left_out"] = [name for name in document["left_out"] if name.startswith(f"{suite} ")]
        header["not_prepared"] = {name: reasons[name] for name in of(suite, reasons)}
        found.append(schema.new_file(suite, document["gpu"], document["date"], rows, **header))
    return found


def save(document: Document, folder: Path | None) -> None:
    """Writes each suite's file into a folder."""
    if folder is not None:
        for data in files(document):
            schema.write(data, folder / f"{data['suite']}.json")


def combined(found: Iterable[schema.ResultFile]) -> Document:
    """The document of several result files; ``headers`` keeps each suite's own."""
    document: Document = {"headers": {}, "rows": [], "left_out": [], "not_prepared": {}}
    for data in found:
        header = {key: value for key, value in data.items() if key not in ("schema", "suite", "rows")}
        document["headers"][data["suite"]] = header
        document = {**{key: header[key] for key in header if key not in document}, **document}
        document["rows"] += nested_rows(data["suite"], data["rows"])
        document["left_out"] += data.get("left_out", [])
        document["not_prepared"] |= data.get("not_prepared", {})
    return document


def paths(given: Iterable[Path], suites: Iterable[str]) -> list[Path]:
    """Result files: those given, and of a folder the files of some suites."""
    found = []
    for path in given:
        found += [path / f"{suite}.json" for suite in suites] if path.is_dir() else [path]
    return [path for path in found if path.is_file() or path in given]


def load(*given: Path, suites: Iterable[str] = ATTENTION_SUITES) -> Document:
    """The document of files, or of folders of them."""
    return combined(schema.read(path) for path in paths(given, suites))


def put(document: Document, row: Row) -> None:
    """Adds a row, in place of an earlier one of its case."""
    rows = document["rows"]
    rows[:] = [other for other in rows if not same_case(other, row)] + [row]


def same_case(a: Row, b: Row) -> bool:
    return (a["suite"], a.get("topic"), a["case"]) == (b["suite"], b.get("topic"), b["case"])


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
