"""Checks that a program can run here: the GPU's architecture, and the PyTorch that compiled its libraries."""

from __future__ import annotations

import torch

from flashpte.export.common.errors import Option, ProgramError
from flashpte.export.files.model_folder import ModelFolder

_FIRST_EXACT = (9, 0)  # kernels for sm_90 and later use features of one architecture (sm_90a) and run on that one only


def parse_arch(arch: str) -> tuple[int, int]:
    """``(9, 0)`` for ``sm_90``; an architecture-specific suffix (``sm_90a``) is ignored.

    Raises:
        ValueError: ``arch`` is not the name of an architecture.
    """
    digits = arch.removeprefix("sm_").rstrip("af")
    if not arch.startswith("sm_") or not digits.isdigit() or len(digits) < 2:
        raise ValueError(f"not an architecture: {arch!r}")
    return int(digits[:-1]), int(digits[-1])


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``arch`` runs on a GPU with compute capability ``capability``.

    Machine code runs on later GPUs of the same major version; from sm_90 on it runs on one architecture only.
    """
    compiled = parse_arch(arch)
    if compiled >= _FIRST_EXACT:
        return compiled == capability
    return compiled[0] == capability[0] and compiled[1] <= capability[1]


def same_torch(compiled: str, running: str) -> bool:
    """Whether two PyTorch versions are the same release (``2.11.0+cu130`` and ``2.11.0+cpu`` are)."""
    return compiled.partition("+")[0] == running.partition("+")[0]


def check_torch(folder: ModelFolder) -> None:
    """Compares the running PyTorch with the one that compiled the program.

    Raises:
        ProgramError: the releases differ, so the functions that a library calls may differ.
    """
    if not same_torch(folder.torch_version, torch.__version__):
        raise ProgramError(
            f"{folder.model_file} was compiled with torch {folder.torch_version}, this is torch {torch.__version__}: "
            "install that release, or export again with this one"
        )


def check_gpu(folder: ModelFolder) -> torch.device:
    """Returns the current GPU if the program's kernels run on it.

    Raises:
        ProgramError: PyTorch can use no GPU, or the kernels do not run on this one.
    """
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else " (this PyTorch is a build without CUDA)"
        raise ProgramError(f"no GPU: {folder.model_file.name} runs on an {folder.arch} GPU{build}")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    check_arch(folder.arch, capability, torch.cuda.get_device_name(device))
    return device


def check_arch(arch: str, capability: tuple[int, int], name: str) -> None:
    """Checks that kernels for ``arch`` run on the GPU ``name`` with compute capability ``capability``.

    Raises:
        ProgramError: they do not; the text names both architectures.
    """
    try:
        fits = runs_on(arch, capability)
    except ValueError as error:
        raise ProgramError(f"the manifest's arch is {arch!r}, which is no GPU architecture") from error
    if not fits:
        own = "sm_{}{}".format(*capability)
        raise ProgramError(f"compiled for {arch}, but {name} is {own}: export again with ", Option("arch", own))
