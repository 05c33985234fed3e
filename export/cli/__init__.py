"""The command lines ``export-model`` and ``run-model``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

EXTRA = ("executorch", "transformers", "safetensors", "rich")
"""Packages of the extra ``flashpte[export]`` that every command needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``export-model``; see :func:`flashpte.export.cli.export_model.main`."""
    if _lacks_extra("export-model"):
        return 1
    from flashpte.export.cli.export_model import main as export_model

    return export_model(argv)


def run_main(argv: Sequence[str] | None = None) -> int:
    """Runs ``run-model``; see :func:`flashpte.export.cli.run_model.main`."""
    if _lacks_extra("run-model"):
        return 1
    from flashpte.export.cli.run_model import main as run_model

    return run_model(argv)


def _lacks_extra(program: str) -> bool:
    """Whether packages of the extra are missing; if so, prints one line that says what to install."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{program}: error: {', '.join(missing)} not found: pip install 'flashpte[export]'", file=sys.stderr)
    return bool(missing)
