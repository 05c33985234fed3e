"""Flags that all benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import schema


def add_result_flags(parser: argparse.ArgumentParser, *, plot: str | None = None) -> None:
    """Adds ``--results``, ``--from-json``, ``--summary`` and, with its help text, ``--plot``."""
    group = parser.add_argument_group("results")
    group.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="write each suite to DIR/<suite>.json as it is measured (in the tree: examples/benchmarks/results/<gpu>)",
    )
    group.add_argument(
        "--from-json", type=Path, nargs="+", metavar="PATH", help="measure nothing, show these files or folders of them"
    )
    group.add_argument("--summary", action="store_true", help="print the short tables only")
    if plot is not None:
        group.add_argument("--plot", type=Path, metavar="DIR", help=plot)


def read_suite(given: list[Path], suite: str) -> schema.ResultFile:
    """The result file of one suite, given by its path or its folder.

    Raises:
        SystemExit: there is none, or it is of another suite.
    """
    path = given[0] / f"{suite}.json" if given[0].is_dir() else given[0]
    try:
        data = schema.read(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if data["suite"] != suite:
        raise SystemExit(f"error: {path} is a result of {data['suite']}, not of {suite}")
    return data
