"""``export-model``: writes an export's files and prints its routing table; an error is one line on stderr."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashpte.export.cli.endings import EXIT_OK, quiet_libraries, report_errors, stdout_may_close
from flashpte.export.cli.export_model_flags import build_parser, check_arguments
from flashpte.export.cli.flag_names import flag_name
from flashpte.export.cli.progress import StageLog
from flashpte.export.cli.report_file import write_report
from flashpte.export.common.options import ExportOptions
from flashpte.export.common.signals import raise_on_termination
from flashpte.export.common.tables import table_lines
from flashpte.export.models.registry import list_targets

if TYPE_CHECKING:
    from flashpte.export.lowering import LoweredModel
    from flashpte.export.pipeline import ExportPlan
    from flashpte.passes import RoutingReport

_COLUMNS = 100
_MANIFESTS = ("manifest.json", "*/manifest.json")  # of one architecture, or of several


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``export-model``.

    Args:
        argv: the arguments after the program's name; ``None`` for those of the process.

    Returns:
        0 when done, 1 after a failure, 2 for wrong options, 130 after Ctrl-C, 128 plus the signal's number after
        SIGTERM and SIGHUP. Every error is one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in arguments or "--verbose" in arguments
    with raise_on_termination():
        return _run(arguments, verbose)


def _run(arguments: list[str], verbose: bool) -> int:
    is_complete = _watch(None)

    def export() -> int:
        nonlocal is_complete
        args = build_parser().parse_args(arguments)
        if args.list_targets:
            with stdout_may_close():
                _print_targets()
            return EXIT_OK
        options = check_arguments(args)
        is_complete = _watch(args.output_dir)
        return _export(args, options)

    return report_errors(
        "export-model", export, verbose=verbose, state=lambda: is_complete(), nothing_done="nothing written"
    )


def _watch(output: Path | None) -> Callable[[], str]:
    """Returns a function that says that an export has been written to ``output`` since this call; "" if not."""

    def identity() -> tuple[int, int] | None:
        try:
            found = os.stat(output) if output is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_dev, found.st_ino)

    def is_complete() -> str:
        # The folder is a new one; a manifest in it means that it is an export and not made by another program.
        replaced = output is not None and identity() != before and any(map(any, map(output.glob, _MANIFESTS)))
        return f"{output} is complete" if replaced else ""

    before = identity()
    return is_complete


def _print_targets() -> None:
    specs = list_targets()
    print(*table_lines([(spec.name, spec.description) for spec in specs], ragged=True), sep="\n")
    for spec in specs:
        if spec.tested:
            print(*textwrap.wrap(f"{spec.name} was tested with {', '.join(spec.tested)}", _COLUMNS), sep="\n")


def _export(args: argparse.Namespace, options: ExportOptions) -> int:
    with StageLog(quiet=args.quiet) as progress, quiet_libraries(args.verbose):
        # torch and transformers load here, after all checks that do not need them
        from flashpte.export.lowering.cross_compile import find_arch
        from flashpte.export.lowering.preflight import check_surroundings
        from flashpte.export.pipeline import export_model, plan_export, preview_routing

        for name in args.arch or ():
            find_arch(name)
        if not args.dry_run:
            check_surroundings(args.output_dir, ())
        plan = plan_export(options)
        lowered: tuple[LoweredModel, ...] = ()
        if args.dry_run:
            reports = preview_routing(plan, progress=progress)
        else:
            result = export_model(plan, args.output_dir, arch=args.arch, format=args.format, progress=progress)
            lowered, reports = result.lowered, result.reports
    with stdout_may_close():
        _print_result(options, lowered, reports)
        for note in (*plan.model_notes, *(f"weights: {note}" for note in plan.weight_notes)):
            print(note)
        if lowered:
            print(_next(plan, lowered[0]))
    if args.report is not None:
        write_report(args.report, {**plan.manifest(), "attention": options.attention}, reports)
    return EXIT_OK


def _print_result(
    options: ExportOptions, lowered: Sequence[LoweredModel], reports: Mapping[str, RoutingReport]
) -> None:
    from flashpte.passes import format_table

    if reports:
        print(format_table(reports))
    else:
        print(f"attention was not replaced (--no-replace {options.attention})")
    if reports and not options.midm_sdpa:
        print("target_verify: attention was not replaced (--no-midm-sdpa)")
    for model in lowered:
        print()
        for path in sorted(model.folder.iterdir()):
            print(f"{_size(path.stat().st_size):>10}  {path}")
    if len(lowered) > 1:
        print("\nequal files, such as the weights, are on the disk once (hard links)")


def _next(plan: ExportPlan, model: LoweredModel) -> str:
    """What to type next."""
    folder = shlex.quote(str(model.folder))
    if plan.runner is not None:
        files = " ".join(path.name for path in (model.model, model.weights) if path is not None)
        return f"next: give {files} of {folder} to {plan.runner.title} (docs/executorch.md)"
    source = "".join(
        f" {flag_name(name)} {shlex.quote(str(path))}"
        for name in ("checkpoint", "gguf_file", "draft")
        if (path := getattr(plan.options, name)) is not None
    )
    check = "" if model.weights is None else f"  run-model {folder} --check{source}\n"
    prompt = '--prompt "The capital of France is"' if plan.extra_files else "--prompt-ids 1,2,3"
    return f"next, on an {model.arch} GPU:\n{check}  run-model {folder} {prompt}\n  run-model {folder} --profile"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
