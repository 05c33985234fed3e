"""The table of linear layers, printed by the benchmark and kept in the docs."""

from __future__ import annotations

from harness.results import OURS
from harness.schema import Row
from harness.tables import markdown, number


def table(rows: list[Row], summary: bool) -> list[str]:
    """Our times beside the best peer's, or beside everybody's."""
    by_product: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        by_product.setdefault((row["case"], row.get("group"), row["m"]), {})[row["runner"]] = row
    grouped = any(group is not None for _, group, _ in by_product)
    peers = [runner for runner in dict.fromkeys(row["runner"] for row in rows) if runner != OURS]
    body = []
    for (case, group, m), found in by_product.items():
        times = {runner: row.get("graph_us") for runner, row in found.items()}
        floor = found[next(iter(found))]["floor_us"]
        best = min((time, peer) for peer in peers if (time := times.get(peer)) is not None)
        own = times.get(OURS)
        cells = [case, *([str(group)] if grouped else []), str(m), number(floor), number(own)]
        cells += [number(best[0]), best[1]] if summary else [number(times.get(peer)) for peer in peers]
        body.append([*cells, number(None if own is None else own / best[0])])
    shown = ["best peer", ""] if summary else peers
    return markdown(["product", *(["group"] if grouped else []), "M", "floor", OURS, *shown, "of best peer"], body)
