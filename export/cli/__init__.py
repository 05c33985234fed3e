"""The command line ``export-model``."""

from flashpte.export.cli.command import main

__all__ = ["main"]
