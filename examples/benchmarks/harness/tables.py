"""Markdown tables: printed by every benchmark, and kept current in the docs.

    cd examples/benchmarks && python -m harness.tables [--check]

rewrites what lies between ``<!-- table: NAME -->`` and ``<!-- end -->`` in README.md and docs/ from the result files,
so that a table in the docs cannot drift from what was measured. :mod:`harness.doc_tables` has the tables by name.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]
MARKED = re.compile(r"(<!-- table: (?P<name>[^>]+?) -->\n)(?P<lines>.*?)(<!-- end -->)", re.DOTALL)


def number(value: float | None, unit: str = "") -> str:
    """A time or ratio with about three digits; nothing is a dash."""
    if value is None:
        return "-"
    return (f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}") + unit


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    cells = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *cells]


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    """A table of plain rows, each a dict by column of which ``case`` comes first."""
    columns = ["case", *dict.fromkeys(key for row in rows for key in row if key != "case")]

    def cell(value: object) -> str:
        return number(value) if isinstance(value, float) else str(value)

    lines = markdown(columns, [[cell(row.get(column, "-")) for column in columns] for row in rows])
    print(f"\n{title}", *lines, sep="\n", flush=True)


def documents(root: Path = ROOT) -> list[Path]:
    """The pages that may hold marked tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def names(text: str) -> list[str]:
    """The tables that a text marks."""
    return [match["name"] for match in MARKED.finditer(text)]


def filled(text: str, tables: Mapping[str, Callable[[], list[str]]]) -> str:
    """A text with its marked tables as the results give them.

    Raises:
        KeyError: a mark names no table.
    """

    def replace(match: re.Match[str]) -> str:
        lines = "\n".join(["", *tables[match["name"]](), ""])
        return f"{match[1]}{lines}\n{match[4]}"

    return MARKED.sub(replace, text)


def main() -> int:
    from harness.doc_tables import TABLES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of date")
    args = parser.parse_args()
    stale = []
    for path in documents():
        text = path.read_text()
        new = filled(text, TABLES)
        if new != text:
            stale.append(path)
            if not args.check:
                path.write_text(new)
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'rewritten'}", file=sys.stderr)
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
