"""A document of results as pictures: a PNG for each suite."""

from __future__ import annotations

from pathlib import Path

from harness.results import OURS, Document, Row, is_peer, ours, time_of

# Whoever is not named is drawn in grey.
COLOURS = {
    OURS: "#c8553d",
    "flashinfer": "#2d6a8e",
    "fa3": "#5b8e7d",
    "torch cudnn": "#8e6c8a",
    "executorch": "#d9a441",
    "executorch causal": "#d9a441",
    "flex": "#7a9e9f",
}
MARKERS = {"flashinfer": "s", "fa3": "^", "torch cudnn": "D", "executorch": "v", "executorch causal": "X", "flex": "P"}


def speeds(row: Row) -> dict[str, float]:
    """What fraction of the floor's speed a runner reaches, ours with its share of the map."""
    times = {label: time_of(row, label) for label in row["times"] if is_peer(label)}
    times[OURS] = ours(row)
    return {label: row["floor"] / time for label, time in times.items() if time is not None}


def draw(document: Document, folder: Path) -> list[Path]:
    """Draws every suite that has peers or a floor; the file names are the suites'.

    Raises:
        ExportError: matplotlib is missing.
    """
    from flashpte.export.runtime.plot import require_matplotlib

    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    suites = dict.fromkeys(row["suite"] for row in document["rows"] if row["times"])
    return [_draw(suite, document, folder / f"{suite}.png") for suite in suites]


def _draw(suite: str, document: Document, path: Path) -> Path:
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row["suite"] == suite and row["times"]]
    found = [speeds(row) for row in rows]
    labels = [OURS, *dict.fromkeys(label for each in found for label in each if label != OURS)]
    figure = Figure(figsize=(8.0, 1.8 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    places = range(len(rows))
    for label in reversed(labels):
        points = [(each[label], place) for each, place in zip(found, places, strict=True) if label in each]
        if not points:
            continue
        if label == OURS:
            axis.barh([y for _, y in points], [x for x, _ in points], color=COLOURS[OURS], alpha=0.8, label=label)
        else:
            colour, marker = COLOURS.get(label, "#9aa5b1"), MARKERS.get(label, "o")
            axis.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=label)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(places, [row["case"] for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, 1.1)
    axis.set_xlabel("speed over the floor's (1 = the measured ceiling), CUDA graphs")
    header = document.get("headers", {}).get(suite, document)
    axis.set_title(f"{suite}, {header['gpu']}, {header['date']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    return path
