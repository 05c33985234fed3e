"""``export-model``: arguments in, files and a routing table out, one line on stderr when something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpte.export.cli.arguments import build_parser, check_arguments
from flashpte.export.cli.progress import StageLog
from flashpte.export.errors import ExportError, UsageError
from flashpte.export.models.registry import list_targets
from flashpte.export.options import ExportOptions

if TYPE_CHECKING:
    from flashpte.export.lowering import LoweredModel
    from flashpte.passes import RoutingReport

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``export-model``.

    Args:
        argv: the arguments after the program's name; ``None`` for those of the process.

    Returns:
        0 when done, 1 after a failure, 2 for wrong options, 130 after Ctrl-C. Every error is one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        args = build_parser().parse_args(arguments)
        if args.list_targets:
            _print_targets()
            return EXIT_OK
        return _export(args, check_arguments(args))
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE, verbose)
    except ExportError as error:
        return _fail(str(error), EXIT_FAILED, verbose)
    except KeyboardInterrupt:
        print("export-model: interrupted; nothing written", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # the door of the program: whatever it is, the user gets one line and an exit code
        hint = "" if verbose else " (run again with -v for the traceback)"
        return _fail(f"unexpected {type(error).__name__}: {error}{hint}", EXIT_FAILED, verbose)


def _fail(message: str, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"export-model: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _print_targets() -> None:
    targets = list_targets()
    width = max(len(spec.name) for spec in targets)
    for spec in targets:
        print(f"{spec.name.ljust(width)}  {spec.description}")


def _export(args: argparse.Namespace, options: ExportOptions) -> int:
    with StageLog(quiet=args.quiet) as progress, _quiet_libraries(args.verbose):
        # torch and transformers load here, after every check that can do without them
        from flashpte.export.lowering.cross_compile import find_arch
        from flashpte.export.lowering.output import check_output_folder
        from flashpte.export.pipeline import export_model, plan_export, preview_routing

        if args.arch is not None:
            find_arch(args.arch)
        if not args.dry_run:
            check_output_folder(args.output_dir)
        plan = plan_export(options)
        lowered = None
        if args.dry_run:
            reports = preview_routing(plan, progress=progress)
        else:
            result = export_model(plan, args.output_dir, arch=args.arch, format=args.format, progress=progress)
            lowered, reports = result.lowered, result.reports
    if args.report is not None:
        _write_report(args.report, {**plan.manifest(), "attention": options.attention}, reports)
    _print_result(options, lowered, reports)
    return EXIT_OK


@contextlib.contextmanager
def _quiet_libraries(verbose: bool) -> Iterator[None]:
    """Keeps the libraries' warnings and prints away: stdout is for results, stderr for progress and errors."""
    if verbose:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _write_report(path: Path, model: Mapping[str, Any], reports: Mapping[str, RoutingReport]) -> None:
    content = {"version": 1, **model, "routing": {name: report.to_dict() for name, report in reports.items()}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"--report {path} cannot be written: {error.strerror}") from error


def _print_result(options: ExportOptions, lowered: LoweredModel | None, reports: Mapping[str, RoutingReport]) -> None:
    from flashpte.passes import format_table

    if reports:
        print(format_table(reports))
    else:
        print(f"attention was not replaced (--no-replace {options.attention})")
    if lowered is not None:
        print()
        for path in sorted(lowered.folder.iterdir()):
            print(f"{_size(path.stat().st_size):>10}  {path}")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
