"""``export-model --plan``: writes the plan of an export in entries, or runs one of its entries."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from flashpte.export.cli.endings import EXIT_OK, quiet_libraries, stdout_may_close
from flashpte.export.cli.export_result import file_line, print_result
from flashpte.export.cli.parser import Parser, nonempty_path
from flashpte.export.cli.progress import StageLog
from flashpte.export.common.errors import UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.files.plan_file import JOIN, command_line, parts_folder, read_plan_file, write_plan_file

_WITH_ENTRY = ("plan", "entry", "parts", "verbose", "quiet")


def add_entry_flags(parser: argparse.ArgumentParser) -> None:
    """The flags ``--plan``, ``--entry`` and ``--parts``."""
    group = parser.add_argument_group("an export on several machines (docs/cross-compiling.md)")
    group.add_argument(
        "--plan",
        type=nonempty_path,
        metavar="FILE",
        help="write a JSON file that divides this export into entries, one per method and architecture and one that "
        "joins them, and do nothing else",
    )
    group.add_argument(
        "--entry", metavar="ID", help="run this entry of the plan FILE, whose flags it takes; join comes last"
    )
    group.add_argument(
        "--parts",
        type=nonempty_path,
        metavar="DIR",
        help="folder where entries put their parts, and join finds them (default: FILE's name with .parts)",
    )


def check_entry_flags(args: argparse.Namespace, parser: Parser) -> None:
    """Checks the combination of flags with ``--plan``, ``--entry`` and ``--parts``.

    Raises:
        UsageError: a flag lacks another, or must not be given with another.
    """
    if args.entry is not None and args.plan is None:
        raise UsageError("--entry needs --plan FILE: the plan that has the entry")
    if args.parts is not None and args.entry is None:
        raise UsageError("--parts belongs to --entry")
    if args.entry is not None:
        for name in (name for name in vars(args) if name not in _WITH_ENTRY):
            if getattr(args, name) != parser.get_default(name):
                raise UsageError(f"--entry takes its flags from the plan: leave out --{name.replace('_', '-')}")
        if args.verbose and args.quiet:
            raise UsageError("--verbose and --quiet cannot be combined: they are opposites")
    elif args.plan is not None:
        if args.dry_run:
            raise UsageError("--plan and --dry-run cannot be combined: each does nothing else")
        if args.report is not None:
            raise UsageError("--plan and --report cannot be combined: planning replaces no attention")
        if args.format == "pt2":
            raise UsageError("--plan needs --format pte: a .pt2 has one method and nothing to divide")


def write_plan(args: argparse.Namespace, options: ExportOptions) -> int:
    """Writes the plan of an export and prints the commands of its entries, one a line; the last one joins.

    Raises:
        UsageError, ExportError: the export cannot be planned, or the file cannot be written.
    """
    with quiet_libraries(args.verbose):
        from flashpte.export.pipeline.entries import plan_entries

        plan_file = plan_entries(options, args.output_dir, arch=args.arch)
        write_plan_file(plan_file, args.plan)
    with stdout_may_close():
        for id in (*(entry.id for entry in plan_file.entries), JOIN):
            print(command_line(args.plan, id))
    return EXIT_OK


def run_entry(args: argparse.Namespace, watch: Callable[[Path], None]) -> int:
    """Runs an entry of the plan; prints its part, or what an export prints.

    Args:
        args: with ``--plan`` and ``--entry``.
        watch: called with the output folder before the entry that joins writes it.

    Raises:
        UsageError: the plan has no such entry.
        ExportError: the entry failed.
    """
    plan_file = read_plan_file(args.plan)
    if args.entry != JOIN:
        plan_file.entry(args.entry)  # refuses an unknown one before torch loads
    parts = args.parts or parts_folder(args.plan)
    with StageLog(quiet=args.quiet) as progress, quiet_libraries(args.verbose):
        from flashpte.export.pipeline.entries import compile_entry, join_entries

        if args.entry != JOIN:
            part = compile_entry(plan_file, args.entry, parts, progress=progress)
        else:
            watch(plan_file.output_dir)
            result = join_entries(plan_file, parts, progress=progress)
    with stdout_may_close():
        if args.entry != JOIN:
            print(file_line(part))
        else:
            print_result(result.plan, result.lowered, result.reports)
    return EXIT_OK
