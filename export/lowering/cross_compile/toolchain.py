"""The host C++ toolchain: compiler, CUDA headers from PyPI wheels, and flags that give the same bytes anywhere.

AOTInductor compiles a C++ wrapper with g++ against a CUDA toolkit. No toolkit is needed here: the Triton wheel has the
CUDA headers, and linking needs only a stub for ``-lcuda``. The header ``nv/target`` that they include comes from the
Triton wheel if it has it, else from ``nvidia-cuda-cccl`` or a toolkit.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashpte.export.common.errors import ExportError

# AVX2 without AVX-512, which every x86 machine with a GPU worth compiling for has. Needs gcc 11 or newer.
HOST_MARCH = "x86-64-v3"

_TOOLKIT = "/usr/local/cuda"  # where NVIDIA's installers put it
_CCCL_DISTRIBUTIONS = ("nvidia-cuda-cccl", "nvidia-cuda-cccl-cu13", "nvidia-cuda-cccl-cu12")

# Functions of libcuda that AOTInductor's wrapper calls. The stub defines them so that a linker that drops unused
# libraries (--as-needed) keeps the DT_NEEDED entry.
_LIBCUDA_SYMBOLS = (
    "cuCtxGetCurrent",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoad",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)


class CrossCompileError(ExportError):
    """Something that cross-compiling needs is missing or does not fit the installed PyTorch."""


@functools.cache
def find_compiler() -> tuple[str, ...]:
    """The C++ compiler as the start of a command: the words of ``$CXX`` (such as ``ccache g++``), or else g++.

    Raises:
        CrossCompileError: a program of the command is not on PATH.
    """
    wanted = shlex.split(os.environ.get("CXX") or "") or ["g++"]
    for program in (word for word in wanted if not word.startswith("-")):
        if shutil.which(program) is None:
            raise CrossCompileError(f"no C++ compiler: {program} is not on PATH (install g++ 11 or newer, or set CXX)")
    return (str(shutil.which(wanted[0])), *wanted[1:])


def compiler_program() -> str:
    """The word of :func:`find_compiler` that is the compiler itself, which Inductor queries."""
    return [word for word in find_compiler() if not word.startswith("-")][-1]


@functools.cache
def compiler_version(compiler: tuple[str, ...]) -> str:
    """The first line of ``compiler --version``."""
    out = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return out.splitlines()[0]


def find_cccl_include() -> Path:
    """The include folder that has ``nv/target``: from the Triton wheel, a CCCL wheel or a CUDA toolkit, in this order.

    Raises:
        CrossCompileError: none of them has the header.
    """
    for folder in _cccl_folders():
        if (folder / "nv" / "target").is_file():
            return folder
    raise CrossCompileError(
        "the CUDA header nv/target is missing: pip install nvidia-cuda-cccl, or set CUDA_HOME to a CUDA toolkit"
    )


def _cccl_folders() -> Iterator[Path]:
    yield _triton_folder() / "include"
    for name in _CCCL_DISTRIBUTIONS:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.parts[-2:] == ("nv", "target"):
                yield Path(str(file.locate())).parent.parent
    nvcc = shutil.which("nvcc")
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _TOOLKIT]
    if nvcc:
        toolkits.append(str(Path(nvcc).resolve().parents[1]))
    for toolkit in filter(None, toolkits):
        yield Path(toolkit) / "include"
        yield Path(toolkit) / "include" / "cccl"  # where CUDA 13 keeps it


def _triton_folder() -> Path:
    """The folder with the parts of a CUDA toolkit in the Triton wheel: include/ and bin/."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia"


def find_triton_tool(name: str) -> Path:
    """The path of a CUDA toolkit program in the Triton wheel (ptxas, cuobjdump, ...).

    Raises:
        CrossCompileError: the wheel does not have it.
    """
    path = _triton_folder() / "bin" / name
    if not path.exists():
        raise CrossCompileError(f"{name} is missing from the triton wheel: reinstall triton")
    return path


def make_cuda_home(folder: Path) -> None:
    """Fills ``folder`` with the parts of a CUDA toolkit that AOTInductor uses: include/, lib64/libcuda.so and bin/."""
    nvidia = _triton_folder()
    include = folder / "include"
    include.mkdir(parents=True)
    for entry in sorted((nvidia / "include").iterdir()):
        (include / entry.name).symlink_to(entry)
    cccl = find_cccl_include()
    if cccl != nvidia / "include":
        (include / "nv").symlink_to(cccl / "nv")
    bin_ = folder / "bin"
    bin_.mkdir()
    for entry in sorted((nvidia / "bin").iterdir()):
        (bin_ / entry.name).symlink_to(entry)
    make_stub_library(folder / "lib64" / "libcuda.so", "libcuda.so.1", _LIBCUDA_SYMBOLS)


def make_stub_library(path: Path, soname: str, symbols: Sequence[str]) -> None:
    """Builds a shared library that exists only for linking.

    Raises:
        CrossCompileError: the compiler failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    source = "\n".join(f"int {symbol}(void) {{ return 0; }}" for symbol in symbols)
    command = [*find_compiler(), "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-x", "c", "-", "-o", str(path)]
    done = subprocess.run(command, input=source, text=True, capture_output=True)
    if done.returncode:
        raise CrossCompileError(f"cannot build a stub of {soname}: {done.stderr.strip().splitlines()[:1]}")


def embed_cubin(cubin_file: str, kernel_name: str) -> str:
    """Makes an object file that holds a cubin between ``__<kernel>_start`` and ``__<kernel>_end``.

    Inductor's own way (``ld -b binary``, then renaming symbols) orders the symbols by a hash of the file's path.

    Returns:
        The object file's path.

    Raises:
        CrossCompileError: the assembler failed.
    """
    # The name includes the kernel's: a program that uses one kernel for two purposes has one cubin under two names.
    source, built = f"{cubin_file}.{kernel_name}.S", f"{cubin_file}.{kernel_name}.o"
    start, end, size = (f"__{kernel_name}_{part}" for part in ("start", "end", "size"))
    Path(source).write_text(
        ".section .rodata\n.balign 16\n"
        f".global {start}\n.global {end}\n.global {size}\n"
        f'{start}:\n.incbin "{cubin_file}"\n{end}:\n.set {size}, {end} - {start}\n'
        '.section .note.GNU-stack,"",@progbits\n'
    )
    done = subprocess.run([*find_compiler(), "-c", source, "-o", built], capture_output=True, text=True)
    if done.returncode:
        raise CrossCompileError(f"cannot embed kernel {kernel_name}: {done.stderr.strip().splitlines()[:1]}")
    return built


class ReproducibleFlags:
    """Rewrites Inductor's compiler command lines so that the binary does not depend on this machine.

    Args:
        prefixes: folders and the fixed names that replace them in ``__FILE__``.
        link_first: arguments that come first when linking.
    """

    def __init__(self, prefixes: dict[str, str], link_first: Sequence[str] = ()) -> None:
        self._maps = [f"-ffile-prefix-map={folder}={name}" for folder, name in prefixes.items()]
        self._link_first = list(link_first)

    def rewrite(self, command_line: str) -> str:
        """Returns the command line to run instead of ``command_line``."""
        compiler, *arguments = shlex.split(command_line)
        if compiler == compiler_program():
            compiler, *arguments = (*find_compiler(), *arguments)
        if platform.machine() == "x86_64":  # Inductor's default is the build machine's own instruction set
            arguments = [f"-march={HOST_MARCH}" if a == "-march=native" else a for a in arguments]
        # Drop line numbers, which the linker would strip with the symbol table anyway.
        arguments = [argument for argument in arguments if argument != "-g1"]
        if "-c" in arguments:
            # A method's host code is one function. Points-to analysis takes time quadratic in its length, two thirds of
            # g++'s 127 s for a prefill of 60 layers, and finds nothing in a list of calls.
            arguments.append("-fno-tree-pta")
        if "-shared" in arguments and "-c" not in arguments:
            # strip-all: the symbol table names temporary files; the dynamic symbol table stays.
            # lazy: some distributions bind all symbols at load time, but PyTorch's headers refer to functions that are
            # never called and that ExecuTorch does not have.
            # exclude-libs: a compiler that links libstdc++ statically would export it, and it would mix with the
            # process's own copy.
            last = ["-Wl,--build-id=none", "-Wl,--strip-all", "-Wl,-z,lazy", "-Wl,--exclude-libs,ALL"]
            return shlex.join([compiler, *self._link_first, *arguments, *last])
        return shlex.join([compiler, *arguments, *self._maps, *self._source_maps(arguments)])

    @staticmethod
    def _source_maps(arguments: Sequence[str]) -> Iterator[str]:
        # Inductor names a source file after a hash of the command line, which holds this machine's paths. If two maps
        # match, gcc takes the later one.
        for argument in arguments:
            if argument.endswith(".cpp") and not argument.startswith("-"):
                suffix = ".".join(Path(argument).name.split(".")[1:])
                yield f"-ffile-prefix-map={argument}=model.{suffix}"
