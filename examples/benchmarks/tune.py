"""Sweeps the tiles of our kernels on this machine's GPU and compares the tables' choices with the best ones.

    python examples/benchmarks/tune.py --kernel decode verify prefill --dims 64 128 256 512 --json tiles.json

For every shape of the grid each tile (and, for decode and verify, number of splits) is compiled, checked against
float32 attention and timed as in ``attention.py``. Printed is the best one and how far the table's choice is from it:
the numbers to fit ``flashpte/kernels/tuning/choose.py`` to, for another GPU or after a kernel changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from harness import cases as case_table
from harness import results, table
from harness.cases import Case, Shape
from harness.timing import ceilings, require_gpu

ROWS = {"decode": [1], "verify": [4, 16], "prefill": []}
SUITE = "tune"


def grid(args: argparse.Namespace) -> list[Case]:
    """Every combination; shapes are entered into the table of shapes, under a name that says what they are."""
    found = []
    for dim in args.dims:
        for group in args.groups:
            name = f"D={dim} group={group}"
            case_table.SHAPES[name] = Shape(args.heads_kv * group, args.heads_kv, dim, 1)
            for kernel in args.kernel:
                lengths = args.prefill_lengths if kernel == "prefill" else args.lengths
                rows = [args.rows or ROWS[kernel]] if kernel == "verify" else [ROWS[kernel]]
                for length in lengths:
                    found += [Case(SUITE, name, length, m) for m in rows[0] or [length]]
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--heads-kv", type=int, default=8)
    parser.add_argument("--rows", nargs="+", type=int, help="rows of verify (default: 4 and 16)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768], help="of decode and verify")
    parser.add_argument("--prefill-lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--prepare-limit", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop then; the result says what is left")
    parser.add_argument("--workers", type=int, help="processes that compile side by side (default: the cores but one)")
    parser.add_argument("--json", type=Path, help="write raw numbers to this file, after every shape")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    require_gpu()
    import torch
    from harness.inputs import Inputs
    from harness.prepare import describe, plan, run_jobs
    from harness.sweep import sweep

    start, cases = time.monotonic(), grid(args)
    torch.manual_seed(0)
    document = results.new_document(ceilings())
    document["prepare"] = run_jobs(plan([], [], cases), args.prepare_limit, args.workers).seconds
    for case in cases:
        if args.time_limit is not None and time.monotonic() - start > args.time_limit:
            document["left_out"].append(case.name)
            continue
        row = {**case.describe(), "floor": case.floor(document["ceilings"]), "layers": 1, "times": {}}
        try:
            row["sweep"] = sweep(Inputs.make(case))
        except Exception as error:
            row["sweep"] = {"failed": describe(error)}
        results.put(document, row)
        results.save(document, args.json)
        torch.cuda.empty_cache()
        print(f"[{time.monotonic() - start:6.1f} s] {case.name}", file=sys.stderr, flush=True)
    results.save(document, args.json)
    print("\n".join(table.sweep_lines(document["rows"])))
    if document["left_out"]:
        print(f"left out: {', '.join(document['left_out'])}")


if __name__ == "__main__":
    main()
