"""Lowers exported programs to ``.pte`` and ``.pt2`` files, on machines with or without a GPU."""

from flashpte.export.files.output_folder import OutputError, check_output_folder
from flashpte.export.files.pte_contents import ContentsError, PteContents, inspect_pte
from flashpte.export.lowering.api import LoweredModel, lower
from flashpte.export.lowering.cross_compile import ARCHES, CrossCompileError, GpuArch, UnknownArchError, find_arch
from flashpte.export.lowering.one_method import compile_method
from flashpte.export.lowering.parts import PartError
from flashpte.export.lowering.plain_errors import LoweringError
from flashpte.export.lowering.self_check import SelfCheckError

__all__ = [
    "ARCHES",
    "ContentsError",
    "CrossCompileError",
    "GpuArch",
    "LoweredModel",
    "LoweringError",
    "OutputError",
    "PartError",
    "PteContents",
    "SelfCheckError",
    "UnknownArchError",
    "check_output_folder",
    "compile_method",
    "find_arch",
    "inspect_pte",
    "lower",
]
