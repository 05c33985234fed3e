"""The C++ wrapper that AOTInductor writes around a program's kernels: how to get it, and what it allocates."""

from __future__ import annotations

import math
import operator
import re
from pathlib import Path

import pytest
from torch.export import ExportedProgram

from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.executorch import write_pte


class HaveSource(Exception):
    """Stops a lowering once its wrapper was generated, before minutes of C++."""


def wrapper_source(program: ExportedProgram, scratch: Path, restore_views: bool = True) -> str:
    """The wrapper of a program lowered to a ``.pte`` for sm_90."""
    sources = []

    def keep(source):
        sources.append(source)
        raise HaveSource

    arch = find_arch("sm_90")
    with pytest.raises(Exception) as stopped, cross_compile(arch, scratch, "pte", restore_views, keep):
        write_pte({"forward": program}, scratch, "flashpte", {})
    if not sources:
        raise stopped.value
    return sources[0]


def allocated(source: str, length: int | None = None) -> list[tuple[int, str]]:
    """Number of elements and dtype of each buffer that the wrapper allocates, with ``length`` for the dynamic size."""
    plain = re.sub(r"(\d)L\b", r"\1", source).replace("static_cast<int64_t>", "").replace("c10::", "")
    plain = re.sub(r"\bs\d+\b", str(length), plain)
    arrays = dict(re.findall(r"int64_t (int_array_\d+)\[\] = \{([^}]+)\}", plain))
    pattern = r"aoti_torch_empty_strided\(\d+, (int_array_\d+), int_array_\d+, cached_torch_dtype_(\w+),"
    calls = re.findall(pattern, plain)
    assert calls, "no allocation was recognised"
    known = {"div_floor_integer": operator.floordiv}
    return [(math.prod(eval(f"[{arrays[name]}]", known)), dtype) for name, dtype in calls]
