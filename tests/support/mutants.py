"""Copies of the kernels package with one changed line, to test the tests."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

import flashpte.kernels
from flashpte.kernels.call import AttentionCall

_COUNTER = itertools.count()


def own(launcher: Callable[..., torch.Tensor], call: AttentionCall) -> AttentionCall:
    """The call as the launcher's package makes it: a mutant has its own class, which also chooses units."""
    kind = sys.modules[f"{launcher.__module__.rpartition('.')[0]}.call"].AttentionCall
    return kind(**{field.name: getattr(call, field.name) for field in dataclasses.fields(call)})


def mutant(folder: Path, file: str, old: str, new: str, module: str) -> ModuleType:
    """Imports ``module`` of a copy of ``flashpte.kernels`` in which ``old`` reads ``new`` in ``file``.

    Args:
        folder: where to put the copy.
        file: path of the changed file in the package, such as ``"primitives.py"``.
        old: text that must occur in the file; every occurrence is replaced.
        new: its replacement.
        module: the module of the copy to import, such as ``"split_k"``.
    """
    name = f"mutant_kernels_{next(_COUNTER)}"
    package = folder / name
    shutil.copytree(Path(flashpte.kernels.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text("")
    for path in package.rglob("*.py"):
        text = path.read_text().replace("flashpte.kernels", name).replace("flashpte::", f"{name}::")
        if path == package / file:
            assert old in text, f"{file} no longer contains {old!r}: update the mutation"
            text = text.replace(old, new)
        path.write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}.{module}")
    finally:
        sys.path.remove(str(folder))
