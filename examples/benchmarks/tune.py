"""Sweeps the tiles of our kernels on this machine's GPU and compares the tables' choices with the best ones.

    python examples/benchmarks/tune.py --kernel decode verify prefill --dims 64 128 256 512 --results run
    python examples/benchmarks/tune.py --random 40 --seed 1 --narrow --results run
    python examples/benchmarks/tune.py --from-json examples/benchmarks/results/h100/random.json --summary

For every shape of the grid, or of shapes drawn from all that the tables are for, each tile (and, for decode and verify,
number of splits) is compiled, checked against float32 attention and timed as in ``attention.py``. Printed is the best
one and how far the table's choice is from it: the numbers to fit ``flashpte/kernels/tuning/`` to, for another GPU or
after a kernel changed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from harness import cases as case_table
from harness import report, results, schema
from harness.cases import Case, Shape
from harness.options import add_result_flags
from harness.timing import ceilings, require_gpu

ROWS = {"decode": [1], "verify": [4, 16], "prefill": []}
SUITE, NARROW_SUITE = "tune", "other"  # of the latter a sweep tries as many tiles as in the benchmark

# What random shapes are drawn from: multiples of 8, which are what can be copied 16 bytes at a time.
DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 320, 512)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
HEADS_KV = (1, 2, 3, 4, 8, 16, 32)
BATCHES = (1, 1, 1, 2, 3, 4, 8)
CONTEXTS = {"decode": (128, 262144), "verify": (128, 262144), "prefill": (128, 32768)}
MOST_BYTES, MOST_FLOP = 2e9, 1e13


def drawn(count: int, seed: int, kernels: list[str], suite: str = SUITE) -> list[Case]:
    """``count`` cases, the kernels in turn; lengths are even on a logarithmic scale. The same for the same ``seed``."""
    generator, found = random.Random(seed), []
    while len(found) < count:
        kernel = kernels[len(found) % len(kernels)]
        least, most = CONTEXTS[kernel]
        length = round(least * (most / least) ** generator.random())
        dim, group, heads_kv = (generator.choice(choices) for choices in (DIMS, GROUPS, HEADS_KV))
        rows = {"decode": 1, "verify": generator.randint(2, 16), "prefill": length}[kernel]
        name = f"D={dim} heads={heads_kv * group}/{heads_kv}"
        case_table.SHAPES[name] = Shape(heads_kv * group, heads_kv, dim, 1)
        case = Case(suite, name, length, rows, batch=generator.choice(BATCHES))
        if case.input_bytes <= MOST_BYTES and case.flop <= MOST_FLOP:
            found.append(case)
    return found


def grid(args: argparse.Namespace) -> list[Case]:
    """What is drawn, or every combination; shapes enter the table of shapes under a name that says what they are."""
    found = []
    suite = NARROW_SUITE if args.narrow else SUITE
    if args.random is not None:
        return drawn(args.random, args.seed, args.kernel, suite)
    for dim in args.dims:
        for group in args.groups:
            name = f"D={dim} group={group}"
            case_table.SHAPES[name] = Shape(args.heads_kv * group, args.heads_kv, dim, 1)
            for kernel in args.kernel:
                lengths = args.prefill_lengths if kernel == "prefill" else args.lengths
                rows = [args.rows or ROWS[kernel]] if kernel == "verify" else [ROWS[kernel]]
                for length in lengths:
                    found += [Case(suite, name, length, m) for m in rows[0] or [length]]
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
    parser.add_argument(
        "--random", type=int, metavar="COUNT", help="that many shapes drawn at random instead of a grid"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--narrow", action="store_true", help="fewer tiles of each shape")
    parser.add_argument("--prepare-limit", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop then; the result says what is left")
    parser.add_argument("--workers", type=int, help="processes that compile side by side (default: the cores but one)")
    add_result_flags(parser)
    return parser.parse_args(arguments)


def suite_of(args: argparse.Namespace) -> str:
    """The suite of a result file."""
    return "grids" if args.random is None else "random"


def save(document: results.Document, args: argparse.Namespace) -> None:
    """Writes random.json or grids.json, whichever suite the shapes are of."""
    if args.results is not None:
        suite = suite_of(args)
        (data,) = results.files({**document, "rows": [{**row, "suite": suite} for row in document["rows"]]})
        schema.write(data, args.results / f"{suite}.json")


def show(document: results.Document, args: argparse.Namespace) -> None:
    """Prints every shape, or how many are near the best tile."""
    rows = document["rows"]
    print("\n".join(report.sweep_summary(rows) if args.summary else report.sweep_lines(rows)))
    if document["left_out"]:
        print(f"left out: {', '.join(document['left_out'])}")


def main() -> None:
    args = parse()
    if args.from_json is not None:
        show(results.load(*args.from_json, suites=("random", "grids")), args)
        return
    require_gpu()
    import torch
    from harness.inputs import Inputs
    from harness.prepare import describe, plan, run_jobs
    from harness.sweep import sweep

    start, cases = time.monotonic(), grid(args)
    torch.manual_seed(0)
    document = results.new_document(ceilings())
    document["arguments"] = {"random": args.random, "seed": args.seed} if args.random is not None else {}
    run_jobs(plan([], [], cases), args.prepare_limit, args.workers)
    for case in cases:
        if args.time_limit is not None and time.monotonic() - start > args.time_limit:
            document["left_out"].append(f"{suite_of(args)} {case.name}")
            continue
        row = {**case.describe(), "floor": case.floor(document["ceilings"]), "layers": 1, "times": {}}
        try:
            row["sweep"] = sweep(Inputs.make(case))
        except Exception as error:
            row["sweep"] = {"failed": describe(error)}
        results.put(document, row)
        save(document, args)
        torch.cuda.empty_cache()
        print(f"[{time.monotonic() - start:6.1f} s] {case.name}", file=sys.stderr, flush=True)
    save(document, args)
    show(document, args)


if __name__ == "__main__":
    main()
