"""The command lines ``export-model`` and ``run-model``."""

from flashpte.export.cli.export_model import main
from flashpte.export.cli.run_model import main as run_main

__all__ = ["main", "run_main"]
