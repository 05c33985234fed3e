"""The command lines ``export-model`` and ``run-model``."""

from flashpte.export.cli.command import main
from flashpte.export.cli.run_command import main as run_main

__all__ = ["main", "run_main"]
