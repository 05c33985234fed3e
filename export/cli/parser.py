"""What the argument parsers of both commands share."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from flashpte.export.common.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Raises an error of one line for a wrong flag; argparse would also print its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises :class:`UsageError`; suggests the flag that an unknown one resembles."""
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        close = difflib.get_close_matches(unknown, list(self._option_string_actions), n=1, cutoff=0.6)
        if message.startswith("unrecognized arguments") and close:
            message = f"unknown flag {unknown}; did you mean {close[0]}?"
        raise UsageError(f"{message} (see {self.prog} --help)")


def new_parser(prog: str, description: str, epilog: str) -> Parser:
    """A parser that prints its texts unwrapped and accepts no abbreviated flags."""
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_verbosity(group: argparse._ArgumentGroup) -> None:
    """The flags ``--verbose`` and ``--quiet``."""
    group.add_argument("-v", "--verbose", action="store_true", help="show warnings and, on an error, the traceback")
    group.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def check_least(flags: Iterable[tuple[str, int | None, int]]) -> None:
    """Checks the lower bound of each flag that was given: ``flags`` holds ``(flag, value, least)``.

    Raises:
        UsageError: a value is below ``least``.
    """
    for flag, value, least in flags:
        if value is not None and value < least:
            raise UsageError(f"{flag} {value}: must be at least {least}")


def nonempty_path(text: str) -> Path:
    """Converts a path argument; refuses "", which is more likely an unset shell variable than the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)
