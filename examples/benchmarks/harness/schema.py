"""A result file: ``results/<gpu>/<suite>.json``, one header and flat rows, every key spelled one way.

``results/`` keeps the latest run of each suite. A row says what was measured and what came out; its keys end in their
unit (``_us``, ``_bytes``, ``_pct``). A key that does not apply is left out. Rows are written one a line, so that a new
run shows in a diff.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, Any]
ResultFile = dict[str, Any]

REQUIRED_HEADER = {"schema": int, "suite": str, "gpu": str, "date": str, "rows": list}
# ``ceilings`` are the measured read bandwidth and matrix rate; ``runs`` has them for each topic of a file that several
# runs made. ``left_out`` names the cases that did not fit in the time, ``not_prepared`` what did not compile, and why.
OPTIONAL_HEADER = {
    "versions": dict,
    "ceilings": dict,
    "runs": list,
    "arguments": dict,
    "tool": str,
    "notes": str,
    "seconds": float,
    "left_out": list,
    "not_prepared": dict,
    "weight_bytes": int,
    "weights_floor_us": float,
}

_TEXT = (
    *("case", "topic", "shape", "runner", "variant", "failed", "failed_plain", "best_tile", "table_tile", "tile"),
    *("kernel", "grid", "attention", "call", "chunks", "part", "programs"),
)
_WHOLE = (
    *("length", "query_rows", "context", "window", "batch", "layers", "flop", "kv_bytes", "tried", "rank", "lost"),
    *("m", "n", "k", "group", "tile_m", "tile_n", "tile_k", "stages", "warps", "kernels", "registers", "shared_bytes"),
    *("dram_read_bytes", "l2_bytes", "tensor_instructions", "program_count", "heads_q", "heads_kv", "head_dim"),
)
_NUMBER = (
    *("floor_us", "graph_us", "plain_us", "map_us", "time_us", "table_us", "best_us", "ratio", "error", "limit"),
    *(
        "dram_pct",
        "tensor_pct",
        "warps_pct",
        "total_us",
        "attention_us",
        "matmul_us",
        "rest_us",
        "idle_us",
        "kernel_us",
    ),
    *("tensor_us", "positions_us", "is_causal_us", "tensor_long_us", "positions_long_us", "tensor_ratio"),
    *("positions_ratio", "map_tensor_us", "map_positions_us", "layer_us"),
)
KEYS: dict[str, type] = {
    **dict.fromkeys(_TEXT, str),
    **dict.fromkeys(_WHOLE, int),
    **dict.fromkeys(_NUMBER, float),
    "met": bool,
}

_OF_ATTENTION = ("decode", "verify", "prefill", "chunk", "other", "random", "grids", "head-dims")
_ATTENTION = ("case", "shape", "length", "query_rows", "layers", "floor_us")
REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_OF_ATTENTION, ("case",)),
    "variants": ("topic", "case", "variant", "graph_us"),
    "masks": ("part", "case"),
    "linear": ("case", "k", "n", "m", "group", "runner", "floor_us"),
    "delta": ("case", "k", "n", "m", "runner", "floor_us"),
    "dense": ("case", "k", "n", "m", "runner", "floor_us"),
    "gemm": ("m", "n", "k", "tile_m", "tile_n", "tile_k", "stages", "warps"),
    "reads": ("kv_bytes", "time_us"),
    "ncu": ("topic", "case", "kernel", "time_us"),
    "whole-model": ("attention", "call", "context"),
    "speculative": ("context",),
}


def _fits(value: object, wanted: type) -> bool:
    if wanted in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def _row_problems(suite: str, row: Mapping[str, Any]) -> list[str]:
    """What is wrong with one row."""
    found = [f"the key {key!r} is not of this schema" for key in row if key not in KEYS]
    found += [f"{key} is {row[key]!r}" for key in row if key in KEYS and not _fits(row[key], KEYS[key])]
    needed = REQUIRED_KEYS[suite]
    if suite in _OF_ATTENTION and ("runner" in row or "table_us" in row):
        needed = _ATTENTION
    return found + [f"{key} is missing" for key in needed if key not in row]


def problems(data: Mapping[str, Any]) -> list[str]:
    """Everything that keeps data from being a result file of this schema; nothing where it is one."""
    found = [f"{key} is missing" for key in REQUIRED_HEADER if key not in data]
    known = REQUIRED_HEADER | OPTIONAL_HEADER
    found += [f"the key {key!r} is not of this schema" for key in data if key not in known]
    found += [f"{key} is {data[key]!r}" for key in data if key in known and not _fits(data[key], known[key])]
    if found:
        return found
    if data["schema"] != SCHEMA:
        return [f"schema {data['schema']}, not {SCHEMA}"]
    if data["suite"] not in REQUIRED_KEYS:
        return [f"the suite {data['suite']!r} is not of this schema"]
    if re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"]) is None:
        found.append(f"date is {data['date']!r}")
    for number, row in enumerate(data["rows"]):
        found += [f"row {number}: {problem}" for problem in _row_problems(data["suite"], row)]
    return found


def rounded(value: Any) -> Any:
    """A float with six digits, which is more than repeats."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def flat_row(**fields: Any) -> Row:
    """A row without what does not apply."""
    return {key: rounded(value) for key, value in fields.items() if value not in (None, "")}


def new_file(suite: str, gpu: str, date: str, rows: Iterable[Row], **header: Any) -> ResultFile:
    """A result file; empty header entries are left out."""
    more = {key: value for key, value in header.items() if value not in (None, {}, [], "")}
    return {"schema": SCHEMA, "suite": suite, "gpu": gpu, "date": date, **more, "rows": list(rows)}


def write(data: ResultFile, path: Path) -> None:
    """Writes a result file, the old one staying whole until the new one is.

    Raises:
        ValueError: it is not of this schema.
    """
    found = problems(data)
    if found:
        raise ValueError(f"{path}: {'; '.join(found[:5])}")
    header = json.dumps({key: value for key, value in data.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in data["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(f'{header[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    partial.replace(path)


def read(path: Path) -> ResultFile:
    """A result file.

    Raises:
        ValueError: it is not of this schema.
    """
    data: ResultFile = json.loads(path.read_text())
    found = problems(data)
    if found:
        raise ValueError(f"{path}: {'; '.join(found[:5])}")
    return data
