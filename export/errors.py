"""The two errors a user of the exporter meets; both carry one line that names the thing and what to do."""

from __future__ import annotations


class ExportError(Exception):
    """The export cannot be done: a broken checkpoint, a full disk, an unsupported model. Exit code 1."""


class UsageError(ExportError):
    """The request itself is wrong: an unknown name, a value out of range, options that conflict. Exit code 2."""
