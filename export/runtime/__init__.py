"""Runs exported programs on a GPU, under libtorch instead of ExecuTorch's runtime."""

from flashpte.export.runtime.folder import ModelFolder, ProgramError, open_folder
from flashpte.export.runtime.program import Program
from flashpte.export.runtime.signature import InputError, MethodSignature, TensorSpec

__all__ = [
    "InputError",
    "MethodSignature",
    "ModelFolder",
    "Program",
    "ProgramError",
    "TensorSpec",
    "open_folder",
]
