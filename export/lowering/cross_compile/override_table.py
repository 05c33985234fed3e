"""Replaces names in other packages temporarily: defines an override, applies a table of them and undoes it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flashpte.export.common import cpus
from flashpte.export.lowering.cross_compile.answers import Answer
from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError, ReproducibleFlags
from flashpte.kernels.tuning import GpuArch

CHECKED = ("2.11", "2.13", "2.14", "2.15")


@dataclasses.dataclass
class Target:
    """State of the lowering in progress, for the replacements.

    Attributes:
        arch: the architecture to compile for.
        work_dir: folder for intermediate files.
        cuda_home: folder that stands for a CUDA toolkit.
        flags: rewrites host compiler command lines.
        compiling: number of Inductor's code generators on the stack.
        defining: whether a program's kernels are being defined; they are compiled when all of them are known.
        processes: how many processes may compile the kernels of one program.
        restore_views: whether view copies become views before ExecuTorch's backend compiles a program.
        on_wrapper: called with the C++ source of each method's wrapper.
        on_kernels: called with how many kernels are compiled and how many there are, in the methods at work.
        answers: compiled methods by name, which are not compiled again.
        keep: takes the answer of the only method; ExecuTorch's code then ends with a ``methods.MethodKept``.
    """

    arch: GpuArch
    work_dir: Path
    cuda_home: str
    flags: ReproducibleFlags
    restore_views: bool = True
    processes: int = dataclasses.field(default_factory=lambda: cpus.usable_cpus())
    compiling: int = 0
    defining: bool = False
    on_wrapper: Callable[[str], None] | None = None
    on_kernels: Callable[[int, int], None] = lambda done, total: None
    answers: Mapping[str, Answer] = dataclasses.field(default_factory=dict)
    keep: Callable[[Answer], None] | None = None


Make = Callable[[Target, Any], Any]


@dataclasses.dataclass(frozen=True)
class Override:
    """One replaced name.

    Attributes:
        name: ``module:attribute.path`` or ``module:dictionary[key]``.
        why: what would go wrong without it.
        make: takes the target and the original value, and returns the replacement. For a method, both are plain
            functions that take ``self``; for a class or static method they take the caller's arguments only.
        adds: whether the name may be new (a method or a key that overrides a default).
        checked: PyTorch versions whose source was read for this override.
    """

    name: str
    why: str
    make: Make
    adds: bool = False
    checked: tuple[str, ...] = CHECKED


@contextlib.contextmanager
def apply(overrides: Sequence[Override], target: Target) -> Iterator[None]:
    """Applies the replacements, and undoes them in reverse order when the block ends, also after an error.

    Raises:
        CrossCompileError: a name to replace does not exist in the installed PyTorch.
    """
    with contextlib.ExitStack() as stack:
        for override in overrides:
            stack.callback(_replace(override, target))
        yield


_ABSENT = object()


def _replace(override: Override, target: Target) -> Callable[[], None]:
    """Applies one override; returns the function that undoes it."""
    module_name, path = override.name.split(":", 1)
    try:
        owner: Any = importlib.import_module(module_name)
        item = re.fullmatch(r"(.+)\[(.+)\]", path)
        *parents, last = (item[1] if item else path).split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        if item:
            owner, last = getattr(owner, last), item[2]
        original = _look_up(owner, last, bool(item))
    except (ImportError, AttributeError) as error:
        raise _gone(override) from error
    if original is _ABSENT and not override.adds:
        raise _gone(override)

    if item:
        owner[last] = override.make(target, None if original is _ABSENT else original)
        if original is _ABSENT:
            return lambda: owner.pop(last, None)
        return lambda: owner.__setitem__(last, original)

    seen = None if original is _ABSENT else getattr(owner, last)
    replacement = override.make(target, seen)
    if isinstance(original, (classmethod, staticmethod)):
        replacement = staticmethod(replacement)  # ``seen`` is already bound
    elif inspect.isclass(owner) and isinstance(replacement, functools.partial):
        raise AssertionError(f"{override.name}: a partial would not be bound to self")
    own = last in vars(owner)
    setattr(owner, last, replacement)
    if not own:
        return lambda: delattr(owner, last)
    return lambda: setattr(owner, last, original)


def _look_up(owner: Any, name: str, is_item: bool) -> Any:
    if is_item:
        return owner.get(name, _ABSENT)
    return inspect.getattr_static(owner, name, _ABSENT)


def _gone(override: Override) -> CrossCompileError:
    return CrossCompileError(
        f"torch {torch.__version__} has no {override.name}, which cross-compiling replaces ({override.why}); "
        f"checked with torch {', '.join(override.checked)}: use one of these"
    )
