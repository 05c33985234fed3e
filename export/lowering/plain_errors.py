"""Turns the errors of compilers and of the disk into one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashpte.export.common.errors import ExportError
from flashpte.export.files.output_folder import OutputError
from flashpte.export.lowering.explain import explain, origin

_ERROR_LINE = re.compile(r"\berror: |multiple definition|undefined reference|cannot find")


class LoweringError(ExportError):
    """A program could not be compiled; ``__cause__`` is the compiler's own error."""


@contextlib.contextmanager
def plain_errors(what: str, output: Path, package: str) -> Iterator[None]:
    """Turns an error of a compiler or of the disk into one line, with the original as its cause."""
    handled = sys.exception()  # an exception that the caller already handles is not a cause of ours
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        chain = list(_chain(error, handled))
        if any(map(_is_full_disk, chain)):
            raise OutputError(f"disk full at {_full_folder(chain, output.absolute().parent)}") from error
        for inner in chain:  # one of our errors, wrapped by a compiler
            if isinstance(inner, ExportError):
                if inner is error:
                    raise
                raise inner from error
        if (meaning := explain(chain, package)) is not None:
            raise LoweringError(f"{what}: {meaning}") from error
        raise LoweringError(f"{what}: {type(error).__name__}: {_summary(str(error)) or origin(error)}") from error


def _chain(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, up to ``handled``."""
    seen: set[int] = {id(handled)}
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [getattr(current, "inner_exception", None), current.__cause__, current.__context__]


_FULL_DISK = os.strerror(errno.ENOSPC)


def _is_full_disk(error: BaseException) -> bool:
    said = (str(error), *(str(getattr(error, name, "")) for name in ("stderr", "output")))
    return getattr(error, "errno", None) == errno.ENOSPC or any(_FULL_DISK in text for text in said)


def _full_folder(chain: Sequence[BaseException], parent: Path) -> str:
    """Names the disk that is full: that of the temporary folder, where compilers write, or of the output's parent."""
    said = " ".join(f"{error} {getattr(error, 'filename', '')}" for error in chain)
    temporary = tempfile.gettempdir()
    return temporary if str(parent) not in said and f"{temporary}/" in said else str(parent)


def _summary(message: str) -> str:
    """Shortens a compiler's message to one line: its lines that report errors, or else its first ones."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.search(line)]
    return " ".join((errors or lines)[:3])[:400]
