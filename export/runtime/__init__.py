"""Runs exported programs on a GPU, under libtorch instead of ExecuTorch's runtime."""

from flashpte.export.common.errors import ProgramError
from flashpte.export.files.model_folder import ModelFolder, open_folder
from flashpte.export.files.signature import InputError, MethodSignature, TensorSpec
from flashpte.export.runtime.program import Program

__all__ = [
    "InputError",
    "MethodSignature",
    "ModelFolder",
    "Program",
    "ProgramError",
    "TensorSpec",
    "open_folder",
]
