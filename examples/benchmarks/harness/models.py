"""Profiles of whole models as flat rows, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.schema import Row, flat_row
from harness.tables import markdown

CALLS = {"prefill": "prefill", "target_verify": "verify", "decode": "decode"}
PARTS = ("total", "attention", "matmul", "rest", "idle")


def profile_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Profiles by kind of attention (``ProfileReport.to_dict``) as rows: one a call, one for each slow kernel of it."""
    found = []
    for kind, report in reports.items():
        for row in report["rows"]:
            case = row["case"]
            call = {"attention": kind, "call": CALLS[case["name"]], "context": case["context"]}
            times = {f"{family}_us": time for family, time in row["families_us"].items()}
            times |= {"total_us": row["total_us"], "idle_us": row["idle_us"], "kernels": row["kernels"]}
            found.append(flat_row(**call, chunks="+".join(map(str, case["chunks"])), **times))
            found += [flat_row(**call, kernel=name, kernel_us=time) for name, time in row["slowest"]]
    return found


def calls(rows: Iterable[Row]) -> list[Row]:
    """The rows of calls, without their kernels."""
    return [row for row in rows if "total_us" in row]


def whole_model(rows: Iterable[Row]) -> list[str]:
    """Each call by kind of kernel, the ways to compute attention below each other."""
    names = {"flashpte": "flashpte", "executorch": "ExecuTorch 1.5.1", "math": "plain math"}
    found = calls(rows)
    body = []
    for call in dict.fromkeys(row["call"] for row in found):
        for row in found:
            if row["call"] == call:
                tokens = sum(int(part) for part in row["chunks"].split("+"))
                shown = "decode" if call == "decode" else f"{call} {tokens:,}" if tokens > 16 else f"{call} M={tokens}"
                times = [f"{row[f'{part}_us']:.0f}" for part in PARTS]
                body.append([names.get(row["attention"], row["attention"]), shown, *times])
    return markdown(["attention by", "call", *PARTS], body)


def slowest(rows: Iterable[Row]) -> list[str]:
    """The kernels that took the most time in each call."""
    found = [row for row in rows if "kernel" in row]
    body = [
        [row["attention"], row["call"], f"{row['context']:,}", row["kernel"], f"{row['kernel_us']:.1f}"]
        for row in found
    ]
    return markdown(["attention by", "call", "context", "kernel", "us"], body)


KINDS = {
    "decode": ("flashpte", "decode"),
    "verify": ("flashpte", "verify"),
    "plain verify": ("no-midm-sdpa", "verify"),
}


def by_context(rows: Iterable[Row]) -> list[dict[str, float]]:
    """For each context of the speculative suite: its floor, and attention and total of decode and of both verifies."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        entry = found.setdefault(row["context"], {"context": row["context"]})
        if "floor_us" in row:
            entry["floor"] = row["floor_us"]
        for name, (kind, call) in KINDS.items():
            if "total_us" in row and (row["attention"], row["call"]) == (kind, call):
                entry[f"{name} attention"], entry[f"{name} total"] = row["attention_us"], row["total_us"]
    return [found[context] for context in sorted(found)]


def speculative(rows: Iterable[Row]) -> list[str]:
    """A row for each context: floor, attention and total."""
    columns = [f"{name} {part}" for part in ("attention", "total") for name in KINDS]
    body = []
    for entry in by_context(rows):
        times = [f"{entry[name]:.1f}" if name in entry else "-" for name in ("floor", *columns)]
        body.append([f"{entry['context']:,}", *times])
    shown = [name.replace("plain verify", "`--no-midm-sdpa`") for name in columns]
    return markdown(["context", "floor of the live keys", *shown], body)
