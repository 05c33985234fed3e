"""Compiles CUDA programs on machines that may have no GPU, no driver and no CUDA toolkit."""

from flashpte.export.lowering.cross_compile.arches import ARCHES, DEFAULT_ARCH, GpuArch, UnknownArchError, find_arch
from flashpte.export.lowering.cross_compile.session import cross_compile
from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError

__all__ = ["ARCHES", "DEFAULT_ARCH", "CrossCompileError", "GpuArch", "UnknownArchError", "cross_compile", "find_arch"]
