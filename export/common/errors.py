"""The errors that a user meets; each carries one line that names the thing and what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Option:
    """An option that an error's text speaks of. Python spells it ``max_seq_len=1``, a command line ``--max-seq-len 1``.

    Attributes:
        name: the field's name.
        value: what was given; ``None`` to speak of the option alone.
        wanted: the text asks for it, so that a command line adds what the flag takes.
    """

    name: str
    value: object = None
    wanted: bool = False

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


def wanted(name: str) -> Option:
    """An option that the user is asked to give."""
    return Option(name, wanted=True)


class ExportError(Exception):
    """The export cannot be done: a broken checkpoint, a full disk, an unsupported model. Exit code 1.

    Args:
        *parts: the line in pieces, options as :class:`Option`.
    """

    def __init__(self, *parts: str | Option):
        super().__init__(*parts)
        self.parts = parts

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[Option], str]) -> str:
        """The line, with options as ``spell`` writes them."""
        return "".join(spell(part) if isinstance(part, Option) else str(part) for part in self.parts)


class UsageError(ExportError):
    """The request itself is wrong: an unknown name, a value out of range, options that conflict. Exit code 2."""


class ProgramError(ExportError):
    """A program cannot be opened or run: a broken file, the wrong machine, inputs that do not fit. Exit code 1."""
