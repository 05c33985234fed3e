"""``export-model``: writes an export's files and prints its routing table; an error is one line on stderr."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashpte.export.cli.endings import EXIT_OK, quiet_libraries, report_errors, stdout_may_close
from flashpte.export.cli.entries import check_entry_flags, run_entry, write_plan
from flashpte.export.cli.export_model_flags import build_parser, check_arguments
from flashpte.export.cli.export_result import print_result
from flashpte.export.cli.progress import StageLog
from flashpte.export.cli.report_file import write_report
from flashpte.export.common.options import ExportOptions
from flashpte.export.common.signals import raise_on_termination
from flashpte.export.common.tables import table_lines
from flashpte.export.models.registry import list_targets

if TYPE_CHECKING:
    from flashpte.export.lowering import LoweredModel

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

    def watch(output: Path) -> None:
        nonlocal is_complete
        is_complete = _watch(output)

    def export() -> int:
        parser = build_parser()
        args = parser.parse_args(arguments)
        if args.list_targets:
            with stdout_may_close():
                _print_targets()
            return EXIT_OK
        check_entry_flags(args, parser)
        if args.entry is not None:
            return run_entry(args, watch)
        options = check_arguments(args)
        if args.plan is not None:
            return write_plan(args, options)
        watch(args.output_dir)
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
        print_result(plan, lowered, reports)
    if args.report is not None:
        write_report(args.report, {**plan.manifest(), "attention": options.attention}, reports)
    return EXIT_OK
