"""A document of results as Markdown."""

from __future__ import annotations

from harness.results import OURS, Document, Row, best_peer, ours, ours_plain, time_of


def number(value: float | None, unit: str = "") -> str:
    """A time or ratio with about three digits; nothing is a dash."""
    if value is None:
        return "-"
    return (f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}") + unit


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    cells = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *cells]


def print_table(title: str, rows: list[dict]) -> None:
    """A table of plain rows, each a dict by column of which ``case`` comes first."""
    columns = ["case", *dict.fromkeys(key for row in rows for key in row if key != "case")]

    def cell(value: object) -> str:
        return number(value) if isinstance(value, float) else str(value)

    lines = markdown(columns, [[cell(row.get(column, "-")) for column in columns] for row in rows])
    print(f"\n{title}", *lines, sep="\n", flush=True)


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
            best = " ".join(f"{key}={value}" for key, value in found["best config"].items())
            cells = [number(found[name]) for name in ("table", "best", "ratio")]
            body.append([row["case"], *cells, str(found["tried"]), best])
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


def lines(document: Document) -> list[str]:
    """Everything that was measured."""
    limits = document["ceilings"]
    read, matmul = limits["read_bytes_per_us"] / 1e6, limits["bf16_flop_per_us"] / 1e6
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    text = [f"{document['gpu']}, {versions}: read {read:.2f} TB/s, bf16 {matmul:.0f} TFLOP/s"]
    for suite in dict.fromkeys(row["suite"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["suite"] == suite]
        text += suite_lines(suite, rows) + sweep_lines(rows)
    text += failures(document)
    if document["left_out"]:
        text += ["", f"left out: {', '.join(document['left_out'])}"]
    return text
