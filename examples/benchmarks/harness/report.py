"""A document of results as Markdown: every runner of every case, or, in short, ours beside the best peer."""

from __future__ import annotations

from harness.results import AOTI, OURS, Document, Row, best_peer, ours, ours_plain, time_of
from harness.tables import markdown, number


def _peer_cells(row: Row, labels: list[str]) -> list[str]:
    return [number(time_of(row, label)) for label in labels]


def suite_lines(suite: str, rows: list[Row]) -> list[str]:
    """The table of one suite: by CUDA graph, then what plain launches take."""
    labels = [
        label
        for label in dict.fromkeys(label for row in rows for label in row["times"])
        if label != OURS and any(time_of(row, label) is not None for row in rows)
    ]
    rated = suite in ("prefill", "chunk")
    columns = ["case", "floor", OURS, "map / layers", *(["TFLOP/s"] if rated else []), *labels]
    columns += ["of floor", "of best peer", "best peer"]
    body = []
    for row in rows:
        time, peer = ours(row), best_peer(row)
        shared = f"{number(row.get('map', {}).get(OURS))} / {row['layers']}"
        cells = [row["case"], number(row["floor"]), number(time_of(row, OURS)), shared]
        if rated:
            cells.append(number(None if time is None else row["flop"] / time / 1e6))
        cells += _peer_cells(row, labels)
        cells.append(number(None if time is None else time / row["floor"]))
        cells.append(number(None if time is None or peer is None else time / peer[0]))
        body.append([*cells, "-" if peer is None else peer[1]])
    return [f"\n### {suite}", "", *markdown(columns, body), *plain_lines(rows)]


def plain_lines(rows: list[Row]) -> list[str]:
    """Plain launches: host and device together, in a loop."""
    labels = list(dict.fromkeys(label for row in rows for label in row["times"]))
    labels = [label for label in labels if any(time_of(row, label, "plain") is not None for row in rows)]
    body = []
    for row in rows:
        own, peer = ours_plain(row), best_peer(row, "plain")
        ratio = None if own is None or peer is None else own[0] / peer[0]
        body.append([row["case"], *(number(time_of(row, label, "plain")) for label in labels), number(ratio)])
    return ["", "Plain launches:", "", *markdown(["case", *labels, "of best peer"], body)] if labels else []


def sweep_lines(rows: list[Row]) -> list[str]:
    """The table's tiles against the best ones."""
    columns = ["case", "table", "best", "ratio", "tried", "best tile"]
    body = []
    for row in rows:
        found = row.get("sweep", {})
        if "ratio" in found:
            cells = [number(found[name]) for name in ("table", "best", "ratio")]
            body.append([row["case"], *cells, str(found["tried"]), found["best tile"]])
        elif "failed" in found:
            body.append([row["case"], found["failed"], *["-"] * 4])
    return ["", "The table's tile against the best one:", "", *markdown(columns, body)] if body else []


def failures(document: Document) -> list[str]:
    """Who did not run where, and why: one line for each reason of a runner."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in document["rows"]:
        for label, entry in row["times"].items():
            for mode in ("failed", "failed plain"):
                if mode in entry:
                    found.setdefault((label, entry[mode]), []).append(row["case"])
    shown = [f"- {label}: {reason} ({len(cases)}: {cases[0]}, ...)" for (label, reason), cases in found.items()]
    return ["", "Not run:", *shown] if shown else []


def headline(header: Document) -> str:
    """Where and with what a result was measured."""
    limits = header.get("ceilings", {})
    read, matmul = (limits.get(name, 0.0) / 1e6 for name in ("read_bytes_per_us", "bf16_flop_per_us"))
    versions = ", ".join(f"{name} {version}" for name, version in header.get("versions", {}).items())
    return f"{header['gpu']}, {header['date']}, {versions}: read {read:.2f} TB/s, bf16 {matmul:.0f} TFLOP/s"


def headlines(document: Document) -> list[str]:
    """A line for each run that a document has results of."""
    headers = document.get("headers") or {"": document}
    return list(dict.fromkeys(headline(header) for header in headers.values()))


def by_suite(document: Document) -> dict[str, list[Row]]:
    """The rows of each suite."""
    found: dict[str, list[Row]] = {}
    for row in document["rows"]:
        found.setdefault(row["suite"], []).append(row)
    return found


def lines(document: Document) -> list[str]:
    """Everything that was measured."""
    text = headlines(document)
    for suite, rows in by_suite(document).items():
        text += suite_lines(suite, rows) + sweep_lines(rows)
    text += failures(document)
    if document["left_out"]:
        text += ["", f"left out: {', '.join(document['left_out'])}"]
    return text


def short_case(row: Row) -> str:
    """A case's name with its suite's usual fields left out."""
    name: str = row["case"]
    return name.removesuffix(" M=1")


def few_rows(rows: list[Row], plain_reads: dict[int, float] | None = None) -> list[str]:
    """Decode or verify: floor, ours, the best peer, and plain launches beside the best peer's."""
    columns = ["case", "floor", *(["plain read"] if plain_reads else []), OURS, "best peer", ""]
    columns += ["of floor", "of best peer", "plain launches"]
    body = []
    for row in rows:
        time, peer = ours(row), best_peer(row)
        cells = [short_case(row), number(row["floor"])]
        if plain_reads:
            cells.append(number(plain_reads.get(row["kv_bytes"])))
        cells += [number(time_of(row, OURS)), *(("-", "-") if peer is None else (number(peer[0]), peer[1]))]
        cells.append(number(None if time is None else time / row["floor"]))
        cells.append(number(None if time is None or peer is None else time / peer[0]))
        own, theirs = time_of(row, AOTI, "plain"), best_peer(row, "plain")
        body.append([*cells, "-" if own is None or theirs is None else f"{number(own)} / {number(theirs[0])}"])
    return markdown(columns, body)


def many_rows(rows: list[Row]) -> list[str]:
    """Prefill or chunks: floor, ours with its rate and with the mask as a tensor, and the best peer."""
    columns = ["case", "floor", OURS, "TFLOP/s", "mask as tensor", "best peer", "", "of floor", "of best peer"]
    body = []
    for row in rows:
        time, peer = ours(row), best_peer(row)
        cells = [row["case"], number(row["floor"]), number(time_of(row, OURS))]
        cells.append(number(None if time is None else row["flop"] / time / 1e6))
        cells.append(number(time_of(row, f"{OURS}, mask as tensor")))
        cells += ("-", "-") if peer is None else (number(peer[0]), peer[1])
        cells.append(number(None if time is None else time / row["floor"]))
        body.append([*cells, number(None if time is None or peer is None else time / peer[0])])
    return markdown(columns, body)


def sweep_summary(rows: list[Row]) -> list[str]:
    """How far the table's tiles are from the best swept ones, by kernel."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if "ratio" in row.get("sweep", {}):
            kind = "decode" if row["rows"] == 1 else "verify" if row["rows"] < row["length"] else "prefill"
            ratios.setdefault(kind, []).append(row["sweep"]["ratio"])
    within = [[str(sum(ratio <= limit for ratio in found)) for limit in (1.05, 1.15)] for found in ratios.values()]
    body = [
        [kind, str(len(found)), *counts, number(max(found))]
        for (kind, found), counts in zip(ratios.items(), within, strict=True)
    ]
    return markdown(["kernel", "shapes", "within 1.05 of the best tile", "within 1.15", "largest ratio"], body)


def summary(document: Document) -> list[str]:
    """Ours beside the best peer, without the other runners."""
    text = headlines(document)
    for suite, rows in by_suite(document).items():
        timed = [row for row in rows if row["times"]]
        if timed:
            text += [f"\n### {suite}", "", *(many_rows if suite in ("prefill", "chunk") else few_rows)(timed)]
        if any("sweep" in row for row in rows):
            text += [f"\n### {suite}: tiles", "", *sweep_summary(rows)]
    return text
