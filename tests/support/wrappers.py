"""Gets the C++ wrapper that AOTInductor writes around a program's kernels, and reads what it allocates."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_cache import shared_kernels
from torch.export import ExportedProgram

from flashpte.export.lowering import api
from flashpte.export.lowering.cross_compile import cross_compile, find_arch, overrides
from flashpte.export.lowering.executorch import write_pte


class HaveSource(Exception):
    """Stops a lowering after its wrapper is generated, before minutes of C++ compiling."""


@contextlib.contextmanager
def keeping_wrappers() -> Iterator[list[str]]:
    """Inside, ``lower`` appends each method's wrapper to the list and continues."""
    sources: list[str] = []

    def keeping(arch, scratch, package, restore_views, on_wrapper, on_kernels, **others):
        def keep(source):
            sources.append(source)
            on_wrapper(source)

        return cross_compile(arch, scratch, package, restore_views, keep, on_kernels, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "cross_compile", keeping)
        yield sources


def wrapper_source(program: ExportedProgram, scratch: Path, restore_views: bool = True, name: str = "sm_90") -> str:
    """The wrapper of a program lowered to a ``.pte`` for the arch ``name``."""
    sources = []

    def keep(source):
        sources.append(source)
        raise HaveSource

    arch = find_arch(name)
    with (
        shared_kernels(),
        pytest.raises(Exception) as stopped,
        cross_compile(arch, scratch, "pte", restore_views, keep),
    ):
        write_pte({"forward": program}, scratch, "flashpte", {})
    if not sources:
        raise stopped.value
    return sources[0]


def kernel_sources(program: ExportedProgram, scratch: Path, patch: pytest.MonkeyPatch) -> str:
    """The Triton source of the kernels that Inductor writes for a program on sm_90; compiles none."""
    sources = []

    def make(target, original):
        def keep(wrapper):
            sources.append(wrapper.kernel_autotune_defs.getvalue())
            raise HaveSource

        return keep

    name = "generate_and_run_autotune_block"
    table = [dataclasses.replace(o, make=make) if o.name.endswith(name) else o for o in overrides.TABLE]
    patch.setattr(overrides, "TABLE", tuple(table))
    arch = find_arch("sm_90")
    with pytest.raises(Exception) as stopped, cross_compile(arch, scratch, "pte", True, lambda source: None):
        write_pte({"forward": program}, scratch, "flashpte", {})
    if not sources:
        raise stopped.value
    return sources[0]


def allocated(source: str, length: int | None = None) -> list[tuple[int, str]]:
    """Number of elements and dtype of each buffer that the wrapper allocates; a dynamic size counts as ``length``."""
    plain = re.sub(r"(\d)L\b", r"\1", source).replace("static_cast<int64_t>", "").replace("c10::", "")
    plain = re.sub(r"\bs\d+\b", str(length), plain)
    arrays = dict(re.findall(r"int64_t (int_array_\d+)\[\] = \{([^}]+)\}", plain))
    pattern = r"aoti_torch_empty_strided\(\d+, (int_array_\d+), int_array_\d+, cached_torch_dtype_(\w+),"
    calls = re.findall(pattern, plain)
    assert calls, "no allocation was recognised"
    known = {"div_floor_integer": operator.floordiv}
    return [(math.prod(eval(f"[{arrays[name]}]", known)), dtype) for name, dtype in calls]
