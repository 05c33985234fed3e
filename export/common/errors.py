"""The errors that users see; each has one line that names the problem and what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Option:
    """An option in an error's text: ``max_seq_len=1`` from Python, ``--max-seq-len 1`` on a command line.

    Attributes:
        name: the field's name.
        value: the value given; ``None`` to name the option alone.
        wanted: whether the text asks for the option; a command line then adds the flag's placeholder.
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
        *parts: the pieces of the line; options are :class:`Option` objects.
    """

    def __init__(self, *parts: str | Option):
        super().__init__(*parts)
        self.parts = parts

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[Option], str]) -> str:
        """The line, with each option written by ``spell``."""
        return "".join(spell(part) if isinstance(part, Option) else str(part) for part in self.parts)


class UsageError(ExportError):
    """The request itself is wrong: an unknown name, a value out of range, options that conflict. Exit code 2."""


class ProgramError(ExportError):
    """A program cannot be opened or run: a broken file, the wrong machine, inputs that do not fit. Exit code 1."""
