"""A whole model, end to end: prefill, decode and verify with our kernels, with ExecuTorch's, and with plain math.

    python examples/benchmarks/whole_model.py --work-dir work --json whole_model.json --plot whole_model.png

Gemma 4 31B at full width, cut to one period of its layers and a smaller vocabulary, with random bfloat16 weights,
exported three times side by side on this machine and run from the .pte. Needs a GPU, about 25 GB of disk and 40 GB of
host memory. On an H200 with 16 cores expect: weights and export 3 to 5 minutes, for the three together; loading and
verifying 15 s each; measuring 5 s each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from exports import export_side_by_side, profile_export, recorded, write_config

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
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for the exports")
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the exports")
    return parser.parse_args()


def main() -> int:
    args = parse()
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
        print(f"{kind}\n" + "\n".join(reports[kind].lines()) + "\n")
        if args.json is not None:  # after each: what is measured stays
            shown = {"arguments": recorded(args)}
            args.json.write_text(json.dumps({**shown, **{k: r.to_dict() for k, r in reports.items()}}, indent=1) + "\n")
    if args.plot is not None and reports:
        from flashpte.export.runtime.plot import draw_beside

        draw_beside(reports, args.plot)
    if not args.keep:
        shutil.rmtree(args.work_dir)
    return 0 if len(reports) == len(args.kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
