"""A suite whose rows are those of :mod:`harness.linear_table`: measures its cases, writes each, shows the table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable

import torch

from harness.linear_table import table
from harness.options import add_result_flags, read_suite
from harness.results import here
from harness.schema import Row, new_file, write
from harness.timing import ceilings, require_gpu

Case = tuple[str, Callable[[dict[str, float]], list[Row]]]
"""A name for people, and a function from the measured ceilings to rows."""


def run_suite(suite: str, description: str, cases: Iterable[Case]) -> None:
    """The program of a suite: reads its flags, measures or reads, and prints the table.

    Args:
        suite: its name in the schema.
        description: for ``--help``.
        cases: what to measure; the results so far are written after each case.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_result_flags(parser)
    args = parser.parse_args()
    if args.from_json is not None:
        rows = read_suite(args.from_json, suite)["rows"]
    else:
        require_gpu()
        torch.manual_seed(0)
        start, ceiling, rows = time.monotonic(), ceilings(), []
        for name, measure in cases:
            rows += measure(ceiling)
            seconds = round(time.monotonic() - start, 1)
            print(f"[{seconds:6.1f} s] {name}", file=sys.stderr, flush=True)
            data = new_file(suite, rows=rows, ceilings=ceiling, seconds=seconds, **here())
            if args.results is not None:
                write(data, args.results / f"{suite}.json")
    print("\n".join(table(rows, args.summary)))
