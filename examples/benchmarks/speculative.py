"""What a round of speculative decoding asks of the target, by context: target_verify beside one decode step.

    python examples/benchmarks/speculative.py --work-dir work --results run --plot run
    python examples/benchmarks/speculative.py --from-json examples/benchmarks/results/h200 --plot run

Gemma 4 31B at full width, cut to two periods of its layers (10 sliding, 2 full) and a smaller vocabulary, with random
bfloat16 weights and a random EAGLE-3 draft that proposes 4 tokens. Exported twice side by side on this machine, with
flashpte's kernels (target_verify and decode) and with the attention of target_verify left to plain arithmetic
(--no-midm-sdpa), then run from the .pte as CUDA graphs, after caches were filled with random keys up to each context.

The floor of a context is the time of its live keys and values (all of them in full layers, a window in sliding ones) at
the read bandwidth measured in the same run. Needs a GPU, about 40 GB of disk and 70 GB of host memory. On an H200 with
16 cores expect 4 to 6 minutes for the exports, a minute for the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from exports import export_side_by_side, profile_export, recorded, write_config
from harness import models, schema
from harness.options import add_result_flags, read_suite

OURS, PLAIN = "flashpte", "no-midm-sdpa"
METHODS = {OURS: ("target_verify", "decode"), PLAIN: ("target_verify",)}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def export_both(args: argparse.Namespace) -> dict[str, Path]:
    """Exports with and without the mid-M kernel at once, only with the methods that are measured."""
    config = write_config(args.work_dir, small=args.small, vocabulary=args.vocabulary)
    common = [
        *("--target", "gemma4-31b", "--config", str(config), "--layers", str(args.layers), "--random-weights"),
        *("--max-seq-len", str(args.max_seq_len), "--chain", str(args.chain)),
        *(() if args.arch is None else ("--arch", args.arch)),
    ]
    arguments = {OURS: [*common, "--with-decode"], PLAIN: [*common, "--no-midm-sdpa"]}
    return export_side_by_side(args.work_dir, {kind: arguments[kind] for kind in args.kinds}, METHODS)


def live_bytes(manifest: dict[str, Any], context: int, rows: int) -> int:
    """Bytes of the keys and values that ``rows`` tokens behind ``context`` others attend to, in all layers."""
    length, window = manifest["model"]["max_seq_len"], manifest["model"]["sliding_window"]
    total = 0
    for name, buffer in manifest["methods"]["target_verify"]["buffers"].items():
        if not name.startswith("kv_cache."):
            continue
        _, heads, slots, dim = buffer["shape"]
        live = context + rows if slots == length else min(context + rows, window + rows - 1)
        total += heads * live * dim * ITEM_BYTES[buffer["dtype"]]
    return total


def weight_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of the weights, which a call reads nearly all of: the data file without its empty caches."""
    shapes = {
        (buffer["dtype"], *buffer["shape"])
        for method in manifest["methods"].values()
        for buffer in method["buffers"].values()
    }
    caches = {math.prod(shape) * ITEM_BYTES[dtype] for dtype, *shape in shapes}  # equal bytes are stored once
    return int(manifest["files"]["aoti_cuda_blob.ptd"]["bytes"]) - sum(caches)


def floors(manifest: dict[str, Any], contexts: list[int], rows: int, read_bytes_per_us: float) -> list[schema.Row]:
    """A row for each context: the time of its live keys and values, which a call of ``rows`` tokens reads."""
    return [
        schema.flat_row(context=context, floor_us=live_bytes(manifest, context, rows) / read_bytes_per_us)
        for context in contexts
    ]


def conclusions(rows: list[dict[str, float]]) -> dict[str, float]:
    """Verify's attention over decode's at the last context; growth of verify's total and of the floor to there."""
    first, last = rows[0], rows[-1]
    result = {}
    if "verify total" in last and "decode total" in last:
        result["verify attention / decode attention, last context"] = (
            last["verify attention"] / last["decode attention"]
        )
        result["verify total / decode total, last context"] = last["verify total"] / last["decode total"]
        result["verify total, last / first context"] = last["verify total"] / first["verify total"]
        result["floor, last / first context"] = last["floor"] / first["floor"]
        if last["floor"] > first["floor"]:
            grown = last["verify total"] - first["verify total"]
            result["growth of verify total / growth of floor"] = grown / (last["floor"] - first["floor"])
    if "plain verify total" in last and "verify total" in last:
        result["plain verify total / verify total, last context"] = last["plain verify total"] / last["verify total"]
    return result


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Attention and totals over the context, one panel each."""
    from flashpte.export.runtime.plot import require_matplotlib

    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"decode": ("#9aa5b1", "o-"), "verify": ("#c8553d", "o-"), "plain verify": ("#2d6a8e", "s--")}
    labels = {"decode": "decode, 1 token", "verify": "target_verify", "plain verify": "target_verify, --no-midm-sdpa"}
    for axis, part in ((left, "attention"), (right, "total")):
        for kind, (colour, style) in styles.items():
            points = [(row["context"], row[f"{kind} {part}"]) for row in rows if f"{kind} {part}" in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=labels[kind])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{part} of a call", fontsize=10)
        axis.set_xlabel("context (tokens)")
        axis.spines[["top", "right"]].set_visible(False)
    floors = [(row["context"], row["floor"]) for row in rows if "floor" in row]
    if floors:
        left.plot(*zip(*floors, strict=True), ":", color="black", label="floor of the live context")
    left.set_ylabel("microseconds")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def report_on(data: schema.ResultFile, args: argparse.Namespace) -> None:
    """Prints the table, what follows from it and, unless it is to be short, the slowest kernels; and draws it."""
    contexts = models.by_context(data["rows"])
    print("\n".join(models.speculative(data["rows"])))
    print(f"weights {data['weight_bytes'] / 1e9:.2f} GB: {data['weights_floor_us']:.0f} us to read")
    for name, value in conclusions(contexts).items():
        print(f"{name}: {value:.3f}")
    if not args.summary:
        print("", *models.slowest(data["rows"]), sep="\n")
    if args.plot is not None:
        args.plot.mkdir(parents=True, exist_ok=True)
        draw(contexts, args.plot / "speculative.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="folder for the exports")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--max-seq-len", type=int, default=131_072)
    parser.add_argument("--chain", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32_768, 131_072])
    parser.add_argument("--kinds", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--small", action="store_true", help="the small Gemma 4, to try the script itself")
    parser.add_argument("--arch", help="GPU to export for (default: this machine's)")
    parser.add_argument("--keep", action="store_true", help="keep the exports")
    add_result_flags(parser, plot="draw DIR/speculative.png")
    args = parser.parse_args()
    if (args.work_dir is None) == (args.from_json is None):
        parser.error("give --work-dir or --from-json")
    return args


def main() -> int:
    args = parse()
    if args.from_json is not None:
        report_on(read_suite(args.from_json, "speculative"), args)
        return 0
    start = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {what}", file=sys.stderr, flush=True)

    folders = export_both(args)
    tell(f"exported {', '.join(folders)}")
    if not folders:
        return 1
    from harness.results import here
    from harness.timing import ceilings

    read = ceilings()["read_bytes_per_us"]
    # the last tokens of a call must find a slot
    longest = args.max_seq_len - args.chain - 1
    contexts = sorted({min(context, longest) for context in args.contexts})
    reports: dict[str, Any] = {}
    manifests = {kind: json.loads((folder / "manifest.json").read_text()) for kind, folder in folders.items()}
    data: schema.ResultFile = {}
    for kind, folder in folders.items():
        try:  # made a moment ago in this very process's folder: hashing the weights again would only take time
            report = profile_export(folder, contexts, None, cuda_graph=True, unverified=True)
        except Exception as error:  # one kind that fails leaves the other
            tell(f"{kind}: {type(error).__name__}: {error}")
            continue
        tell(f"measured {kind}")
        reports[kind] = report.to_dict()
        manifest = manifests.get(OURS, manifests[kind])
        data = schema.new_file(
            "speculative",
            rows=[*floors(manifest, contexts, args.chain + 1, read), *models.profile_rows(reports)],
            **here() | {"versions": manifest["versions"]},
            ceilings={"read_bytes_per_us": read},
            arguments=recorded(args),
            weight_bytes=weight_bytes(manifest),
            weights_floor_us=weight_bytes(manifest) / read,
        )
        if args.results is not None:  # after each: what is measured stays
            schema.write(data, args.results / "speculative.json")
    if reports:
        report_on(data, args)
    if not args.keep:
        shutil.rmtree(args.work_dir)
    return 0 if len(reports) == len(args.kinds) else 1


if __name__ == "__main__":
    sys.exit(main())
