"""Attention in a program that AOTInductor compiled: what a layer of an exported model pays without a CUDA graph.

A program holds several attentions, as a model's does, and is run by AOTInductor's loader. What a launch costs then is
some C++ in front of it, and not a call from Python.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from flashpte.export.lowering import lower
from harness.cases import Case
from harness.inputs import Inputs
from harness.runner import Variant

VARIABLE = "FLASHPTE_BENCH_PACKAGES"
ARCH = "sm_90"
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
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="flashpte-bench-")
    return Path(os.environ[VARIABLE])


def not_in_a_program(case: Case) -> str | None:
    """Why a case is not compiled."""
    return None if not case.prefills and case.length == KEYS else f"compiled at {KEYS:,} keys"


def path_of(case: Case) -> Path:
    """The compiled program of a case."""
    return package_folder() / case.key.replace(" ", "_") / "model.pt2"


def compile_program(attend: Callable[..., torch.Tensor], case: Case, shared: tuple[torch.Tensor, ...]) -> None:
    """Compiles :data:`LAYERS` calls of ``attend``; needs no GPU.

    Args:
        attend: takes query, key and value, then the tensors of ``shared``.
        case: their shapes.
        shared: inputs of all calls, on the CPU.
    """
    # Tensors of their own for each call: of inputs that are one tensor, export keeps one.
    sets = Inputs.make(case, LAYERS, "cpu").sets
    with torch.no_grad():
        program = torch.export.export(_Layers(attend), (sets, shared))
    lower({"forward": program}, output_dir=path_of(case).parent, format="pt2", arch=ARCH)


def calls_of_program(inputs: Inputs, shared: tuple[torch.Tensor, ...]) -> Variant:
    """The compiled program's calls, on rotating inputs."""
    sets = inputs.sets
    rounds = [[sets[(start + i) % len(sets)] for i in range(LAYERS)] for start in range(0, len(sets), LAYERS)]
    # The loader itself: its Python front end parses the program's call convention in every call, and before it loads
    # one it finds out what this machine's processor can do by compiling for each of its extensions, for 50 seconds.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path_of(inputs.case)), "model", False, 1, -1)
    flat = [[*(tensor for s in chosen for tensor in s), *shared] for chosen in rounds]
    return Variant([lambda i=i: loader.boxed_run(list(i)) for i in flat], lambda result: result[0], LAYERS)
