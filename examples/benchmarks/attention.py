"""Attention kernels on one GPU, beside every peer that runs there, with floors and targets from the same run.

    python examples/benchmarks/attention.py --results run --plot run
    python examples/benchmarks/attention.py --suite decode verify --cases llama --peers torch fa3 --fa3 LIBRARY
    python examples/benchmarks/attention.py --from-json examples/benchmarks/results/h100 --summary
    python examples/benchmarks/attention.py --from-json run --against examples/benchmarks/results/h100

Times are microseconds per call: medians of CUDA-graph replays over inputs that rotate through more memory than L2, and
of plain launches in a Python loop, host included. Every result is compared with float32 attention (of sampled rows,
where there are many) before it is timed. "floor" is the time of the bytes (decode, verify: keys and values of the
context at the measured read bandwidth) or of the arithmetic (prefill: visible scores at the measured matrix rate). A
tile map is made once for all layers of a mask: it is timed on its own, and our time in comparisons contains its share.

Peers are PyTorch's backends, FlexAttention, and, where they are installed, ExecuTorch's operators, FlashInfer (needs
nvcc and ninja) and FlashAttention 3 (--fa3, the library of a vLLM wheel that was built for this PyTorch).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from harness import report, results, targets
from harness.cases import SUITES, Case, choose
from harness.options import add_result_flags
from harness.timing import ceilings, require_gpu


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=tuple(SUITES), default=list(SUITES))
    parser.add_argument("--cases", default="", metavar="SUBSTRING", help="only cases whose name contains it")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only peers whose name starts so (none: no peers)")
    parser.add_argument("--fa3", type=Path, metavar="FILE", help="library of FlashAttention 3")
    parser.add_argument(
        "--make-programs",
        type=Path,
        metavar="DIR",
        help="lower the programs for plain mode, which needs no GPU, and end",
    )
    parser.add_argument("--programs", type=Path, metavar="DIR", help="use programs made beforehand")
    parser.add_argument("--no-prepare", action="store_true", help="compile everything where it is timed")
    parser.add_argument("--prepare-limit", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--workers", type=int, help="processes that compile side by side (default: the cores but one)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop then; the result says what is left")
    parser.add_argument("--resume", action="store_true", help="keep what the files of --results hold already")
    add_result_flags(parser, plot="draw DIR/<suite>.png for each suite")
    parser.add_argument(
        "--against", type=Path, nargs="+", metavar="PATH", help="with --from-json: show where other results differ"
    )
    args = parser.parse_args(arguments)
    if args.resume and args.results is None:
        parser.error("--resume needs --results")
    if args.against is not None and args.from_json is None:
        parser.error("--against needs --from-json")
    return args


def show(document: results.Document, args: argparse.Namespace) -> None:
    """Prints tables and targets and draws the plots."""
    if args.summary:
        text = [*report.summary(document), "", targets.count(document)]
    else:
        text = [*report.lines(document), "\n### targets", "", *targets.lines(document)]
    print("\n".join(text), flush=True)
    if args.plot is not None:
        from harness.plots import draw

        for path in draw(document, args.plot):
            print(path, file=sys.stderr)


def compare(document: results.Document, other: results.Document) -> None:
    """Prints where two runs differ."""
    found = results.differences(document, other)
    for difference, case, label in found[:20]:
        print(f"{difference:6.1%}  {case}: {label}")
    print(f"{sum(d < 0.05 for d, _, _ in found)} of {len(found)} times differ by less than 5%")


def prepare_all(runners, cases: list[Case], args: argparse.Namespace, document: results.Document) -> dict:
    """Compiles for all cases; returns what is not prepared, with reasons."""
    import torch
    from harness.prepare import plan, run_jobs

    torch.cuda.empty_cache()
    swept = [case for case in cases if case.suite == "other"]
    outcome = run_jobs(plan(runners, cases, swept), args.prepare_limit, args.workers)
    for label, case in list(outcome.failed):
        if label == results.OURS:  # tried again where it is timed: without it nothing can be said
            outcome.failed.pop((label, case))
    document["not_prepared"] = {f"{label}: {case}": reason for (label, case), reason in outcome.failed.items()}
    return outcome.failed


def known_failures(document: results.Document) -> dict[tuple[str, str], str]:
    """Who failed before this process was started again, by runner and case."""
    return {
        (label, f"{row['suite']} {row['case']}"): entry["failed"]
        for row in document["rows"]
        for label, entry in row["times"].items()
        if "failed" in entry
    } | {tuple(name.split(": ", 1)): reason for name, reason in document.get("not_prepared", {}).items()}


def run(args: argparse.Namespace) -> results.Document:
    """Measures all cases; what is measured stays, whatever happens to the next."""
    import torch
    import torch._inductor.config
    from harness.external import FA3_VARIABLE
    from harness.measure import DeviceLost, measure
    from harness.programs import VARIABLE, package_folder
    from harness.runners import chosen

    start = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {what}", file=sys.stderr, flush=True)

    if args.programs is not None:
        os.environ[VARIABLE] = str(args.programs.resolve())
    if args.fa3 is not None:
        os.environ[FA3_VARIABLE] = str(args.fa3.resolve())
    package_folder()  # before processes that inherit it
    torch._inductor.config.compile_threads = 1  # what there is to compile is in caches
    torch.manual_seed(0)
    cases, runners = choose(args.suite, args.cases), chosen(args.peers)
    earlier = results.paths([args.results], args.suite) if args.resume else []
    resumed = any(path.is_file() for path in earlier)
    document = results.load(*earlier) if resumed else results.new_document(ceilings())
    failed = known_failures(document)
    if not args.no_prepare and not resumed:
        failed |= prepare_all(runners, cases, args, document)
        tell(f"prepared, {len(failed)} failed")
    done = {(row["suite"], row["case"]) for row in document["rows"] if row.get("lost", 2) >= 2}
    lost_before = {(row["suite"], row["case"]): row.get("lost", 0) for row in document["rows"]}
    document["left_out"] = []
    for case in cases:
        if (case.suite, case.name) in done:
            continue
        if args.time_limit is not None and time.monotonic() - start > args.time_limit:
            document["left_out"].append(case.key)
            continue
        lost_times = lost_before.get((case.suite, case.name), 0)
        # Whoever it was, our own times are worth a second try.
        who = [runner for runner in runners if runner.ours or not lost_times]
        try:
            results.put(document, measure(case, who, failed, document["ceilings"]))
        except DeviceLost as lost:
            results.put(document, lost.row | {"lost": lost_times + 1})
            results.save(document, args.results)
            tell(f"{case.key}: {lost}")
            start_again(args, time.monotonic() - start)
            break
        except Exception as error:
            document["left_out"].append(f"{case.key} ({type(error).__name__}: {error})"[:300])
            torch.cuda.empty_cache()
        results.save(document, args.results)
        tell(case.key)
    document["seconds"] = round(document.get("seconds", 0.0) + time.monotonic() - start, 1)
    results.save(document, args.results)
    if args.programs is None:
        shutil.rmtree(package_folder(), ignore_errors=True)
    return document


def start_again(args: argparse.Namespace, spent: float) -> None:
    """Replaces this process, whose GPU context is lost, by one that goes on with the next runner."""
    if args.results is None:
        raise SystemExit("error: a runner made the GPU unusable; with --results the rest would have been measured")
    sys.stdout.flush()
    more = ["--resume"] if not args.resume else []
    if args.time_limit is not None:
        more += ["--time-limit", str(max(0.0, args.time_limit - spent))]
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *more])


def loaded(given: list[Path]) -> results.Document:
    """Earlier results.

    Raises:
        SystemExit: there are none.
    """
    try:
        document = results.load(*given)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if not document["rows"]:
        raise SystemExit(f"error: {', '.join(map(str, given))}: no results of attention")
    return document


def make_programs(args: argparse.Namespace) -> None:
    """Lowers what the plain mode runs, for a GPU machine to carry."""
    from harness.ours import make_program
    from harness.programs import VARIABLE, not_in_a_program

    os.environ[VARIABLE] = str(args.make_programs.resolve())
    for case in choose(args.suite, args.cases):
        if not_in_a_program(case) is None:
            make_program(case)
            print(case.key, file=sys.stderr, flush=True)


def main() -> None:
    args = parse()
    if args.make_programs is not None:
        make_programs(args)
        return
    if args.from_json is not None:
        document = loaded(args.from_json)
        if args.against is not None:
            compare(document, loaded(args.against))
        else:
            show(document, args)
        return
    require_gpu()
    show(run(args), args)


if __name__ == "__main__":
    main()
