"""Allocates scratch memory for kernels of a lowered program, such as those that build tensor maps.

Triton gives the bytes that one program of a launch needs; program ``i`` writes at offset ``i`` times that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def cpp_scratch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Allocates scratch memory for all programs of a launch, as PyTorch 2.13 and newer do; 2.11 does so for one."""

    @functools.wraps(original)
    def of_all_programs(self: Any, idx: int, workspace: Any, prefix: str | None = None) -> Any:
        scratch = original(self, idx, workspace, prefix)
        if scratch is None or workspace.size <= 0:
            return scratch
        (size, *lines), name = scratch
        if "grid_0" not in size:
            of_one = f"{{{workspace.size}}}"
            if of_one not in size:
                raise RuntimeError(f"Inductor's code for a kernel's memory is not what was expected: {size}")
            size = size.replace(of_one, f"{{static_cast<int64_t>({workspace.size}) * grid_0 * grid_1 * grid_2}}")
        return [size, *lines], name

    return of_all_programs
