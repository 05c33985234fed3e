"""A whole model, end to end: prefill, decode and verify with our kernels, with ExecuTorch's, and with plain math.

    python examples/benchmarks/whole_model.py --work-dir work --results run --plot run
    python examples/benchmarks/whole_model.py --from-json examples/benchmarks/results/h200 --summary

Gemma 4 31B at full width, cut to one period of its layers and a smaller vocabulary, with random bfloat16 weights,
exported three times side by side on this machine and run from the .pte. Needs a GPU, about 25 GB of disk and 40 GB of
host memory. On an H200 with 16 cores expect: weights and export 3 to 5 minutes, for the three together; loading and
verifying 15 s each; measuring 5 s each.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from exports import export_side_by_side, profile_export, recorded, write_config
from harness import models, schema
from harness.options import add_result_flags, read_suite
from harness.results import here

KINDS = {"flashpte": [], "executorch": ["--no-replace", "executorch"], "math": ["--no-replace", "math"]}


def export_all(args: argparse.Namespace) -> dict[str, Path]:
    """Exports every kind at once; returns the folders of those that succeeded."""
    config = write_config(args.work_dir, small=args.small, vocabulary=args.vocabulary)
    common = [
        *("--target", "gemma4-31b", "--config", str(config), "--layers", str(args.layers), "--random-weights"),
        *("--max-seq-len", str(args.max_seq_len), "--max-prefill-chunk", str(args.prefill_chunk)),
        *("--verify-window", str(args.verify_window)),
    ]
    return export_side_by_side(args.work_dir, {kind: [*common, *KINDS[kind]] for kind in args.kinds})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="folder for the exports")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--max-seq-len", type=int, default=32_768)
    parser.add_argument("--prefill-chunk", type=int, default=1024)
    parser.add_argument("--verify-window", type=int, default=5)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--small", action="store_true", help="the small Gemma 4, to try the script itself")
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--keep", action="store_true", help="keep the exports")
    add_result_flags(parser, plot="draw DIR/whole-model.png, after a measurement")
    args = parser.parse_args()
    if (args.work_dir is None) == (args.from_json is None):
        parser.error("give --work-dir or --from-json")
    return args


def show(rows: list[schema.Row], short: bool) -> None:
    """Prints the calls, and unless it is to be short the slowest kernels of each."""
    print("\n".join(models.whole_model(rows)))
    if not short:
        print("", *models.slowest(rows), sep="\n")


def main() -> int:
    args = parse()
    if args.from_json is not None:
        show(read_suite(args.from_json, "whole-model")["rows"], args.summary)
        return 0
    start = time.monotonic()
    folders = export_all(args)
    print(f"[{time.monotonic() - start:6.1f} s] exported {', '.join(folders)}", file=sys.stderr)
    reports = {}
    for kind, folder in folders.items():
        try:
            reports[kind] = profile_export(folder, [args.context], args.prefill, cuda_graph=args.cuda_graph)
        except Exception as error:  # one kind that fails leaves the others
            print(f"{kind}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(f"[{time.monotonic() - start:6.1f} s] measured {kind}", file=sys.stderr)
        rows = models.profile_rows({name: report.to_dict() for name, report in reports.items()})
        if args.results is not None:  # after each: what is measured stays
            data = schema.new_file("whole-model", rows=rows, arguments=recorded(args), **here())
            schema.write(data, args.results / "whole-model.json")
    if reports:
        show(rows, args.summary)
    if args.plot is not None and reports:
        from flashpte.export.runtime.plot import draw_beside

        args.plot.mkdir(parents=True, exist_ok=True)
        draw_beside(reports, args.plot / "whole-model.png")
    if not args.keep:
        shutil.rmtree(args.work_dir)
    return 0 if len(reports) == len(args.kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
