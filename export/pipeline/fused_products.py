"""The products of an export's programs: those that share an input become one, and few rows get kernels of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from flashpte.export.files.fused_weights import FusedWeights
from flashpte.export.files.mapped_tensors import write_mapped_parts

if TYPE_CHECKING:
    from flashpte.passes import Report


class JoinedWeights:
    """Makes fused weights. Methods that fuse the same parts get the same tensor.

    Args:
        folder: where their bytes go (:mod:`flashpte.export.files.mapped_tensors`); ``None`` keeps them in memory.
        values: ``False`` leaves them uninitialized, for parts that are too.
    """

    def __init__(self, folder: Path | None = None, values: bool = True) -> None:
        self._folder, self._values = folder, values
        self._made: dict[tuple[int, ...], tuple[torch.Tensor, Sequence[torch.Tensor]]] = {}
        self._numbers = itertools.count()

    def __call__(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parts, end to end along their first dimension."""
        key = tuple(part.data_ptr() for part in parts)
        if key not in self._made:
            if not self._values:
                joined = parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
            elif self._folder is None:
                joined = torch.cat(list(parts))
            else:
                joined = write_mapped_parts(parts, self._folder / f"joined-{next(self._numbers)}")
            self._made[key] = joined, parts  # the parts keep their addresses
        return self._made[key][0]


def rewrite_products(
    programs: Mapping[str, ExportedProgram],
    folder: Path | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    only: Collection[str] | None = None,
    values: bool = True,
) -> tuple[dict[str, ExportedProgram], dict[str, dict[str, Report]], FusedWeights]:
    """Fuses products that share an input, and replaces those with few rows; does not change the input programs.

    Args:
        programs: methods by name, which share weights by name and by memory.
        folder: an empty folder for the bytes of fused weights, which must stay as long as the programs.
        progress: called with the name of each stage.
        only: methods to rewrite, with the same result as if all were; ``None`` for all.
        values: ``False`` leaves fused weights uninitialized, for programs whose weights are too.

    Returns:
        The new programs; the rewrites' reports by method and rewrite; and what the fused weights consist of.
    """
    from flashpte.passes import rewrite_program
    from flashpte.passes.linear.few_rows import FewRowsRewrite
    from flashpte.passes.linear.fuse import FuseLinears, agreed
    from flashpte.passes.linear.gated import GatedRewrite

    if progress is not None:
        progress("fuse products")
    allowed, join = agreed(list(programs.values())), JoinedWeights(folder, values)
    rewritten, reports = {}, {}
    fused: FusedWeights = {}
    for name, program in programs.items():
        if only is not None and name not in only:
            continue
        rewritten[name], reports[name] = rewrite_program(
            program, (FuseLinears(allowed, join), FewRowsRewrite(), GatedRewrite())
        )
        for outcome in reports[name][FuseLinears.name].outcomes:
            fused.update(outcome.result or {})
    return rewritten, reports, fused
