"""What the argument parsers of the command lines share."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import NoReturn

from flashpte.export.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as an exception: one line, where argparse prints its whole usage as well."""

    def error(self, message: str) -> NoReturn:
        """Raises :class:`UsageError`; suggests the flag that an unknown one resembles."""
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        close = difflib.get_close_matches(unknown, list(self._option_string_actions), n=1, cutoff=0.6)
        if message.startswith("unrecognized arguments") and close:
            message = f"unknown flag {unknown}; did you mean {close[0]}?"
        raise UsageError(f"{message} (see {self.prog} --help)")


def nonempty_path(text: str) -> Path:
    """A path argument; an empty one is more likely an unset shell variable than the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)
