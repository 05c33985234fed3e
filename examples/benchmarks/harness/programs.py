"""Attention in a program that AOTInductor compiled: what a layer of an exported model pays without a CUDA graph.

A program holds several attentions, as a model's does, and is run by AOTInductor's loader. What a launch costs then is
some C++ in front of it, and not a call from Python.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from harness.cases import Case
from harness.runner import Variant

LAYERS = 8
KEYS = 4096  # where the plain mode's target is


class _Layers(torch.nn.Module):
    """Several calls, each on inputs of its own."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, sets, shared):
        return [self.attend(*s, *shared) for s in sets]


def package_folder() -> Path:
    """Where compiled programs are kept: for this benchmark's processes, which inherit the variable."""
    folder = os.environ.get("FLASHPTE_BENCH_PACKAGES")
    if folder is None:
        folder = os.environ["FLASHPTE_BENCH_PACKAGES"] = tempfile.mkdtemp(prefix="flashpte-bench-")
    return Path(folder)


def not_in_a_program(case: Case) -> str | None:
    """Why a case is not compiled."""
    return None if not case.prefills and case.length == KEYS else f"compiled at {KEYS:,} keys"


def in_a_program(
    label: str,
    attend: Callable[..., torch.Tensor],
    sets: Sequence[tuple[torch.Tensor, ...]],
    shared: tuple[torch.Tensor, ...],
    key: str,
    compile_: Callable[[ExportedProgram, Path], None],
) -> dict[str, Variant]:
    """:data:`LAYERS` calls of ``attend`` in one program.

    Args:
        label: whose program it is.
        attend: takes the tensors of a set, then those of ``shared``.
        sets: inputs, which the calls rotate through.
        shared: inputs of all calls.
        key: the case.
        compile_: compiles a program of CPU tensors into a ``.pt2`` file of a given path.
    """
    path = package_folder() / f"{label} {key}".replace(" ", "_") / "model.pt2"
    rounds = [[sets[(start + i) % len(sets)] for i in range(LAYERS)] for start in range(0, len(sets), LAYERS)]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        example = torch.utils._pytree.tree_map(lambda tensor: tensor.cpu(), (rounds[0], shared))
        with torch.no_grad():
            compile_(torch.export.export(_Layers(attend), example), path)
    # The loader itself: its Python front end parses the program's call convention in every call.
    loader = torch._inductor.aoti_load_package(str(path)).loader
    inputs = [[*(tensor for s in chosen for tensor in s), *shared] for chosen in rounds]
    return {"": Variant([lambda i=i: loader.boxed_run(list(i)) for i in inputs], lambda result: result[0], LAYERS)}
