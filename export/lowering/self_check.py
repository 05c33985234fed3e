"""Checks a lowered model before it is written out, so that an error on the user's GPU shows here, with a reason."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from flashpte.export.common.errors import ExportError
from flashpte.export.files.mapped_tensors import mapped_file, sha256_of
from flashpte.export.files.names import COPY_OPERATORS, PTE_NAME
from flashpte.export.files.pte_contents import (
    Method,
    PteContents,
    SharedLibrary,
    WeightEntry,
    inspect_pte,
    read_library,
)
from flashpte.export.lowering.cross_compile import GpuArch
from flashpte.export.lowering.mutated_buffers import mutated_buffers
from flashpte.export.lowering.shims import missing_shims
from flashpte.passes.graph.values import all_nodes

_COMPARE_BYTES = 64 << 20


class SelfCheckError(ExportError):
    """A lowered model failed its check; no output is written."""


def check_pte(folder: Path, programs: Mapping[str, ExportedProgram], arch: GpuArch, attention: str) -> None:
    """Checks ``model.pte`` and its weights against the programs that they were made from.

    Raises:
        SelfCheckError: the check failed; the text names the first problem.
    """
    contents = inspect_pte(folder / PTE_NAME)
    if set(contents.methods) != set(programs):
        raise SelfCheckError(f"the file has methods {sorted(contents.methods)}, not {sorted(programs)}")
    same: set[tuple[str, int]] = set()
    for name, method in contents.methods.items():
        # Kernels that ExecuTorch added, not those that the program calls.
        foreign = frozenset() if attention == "executorch" else executorch_kernels(_called_operators(programs[name]))
        for problem in _method_problems(method, arch, foreign):
            raise SelfCheckError(f"method {name}: {problem}")
        for problem in _weight_problems(contents, name, programs[name], same):
            raise SelfCheckError(f"method {name}: {problem}")
    if clash := shared_name_problem({name: method.weights for name, method in contents.methods.items()}):
        raise SelfCheckError(clash)


def shared_name_problem(weights: Mapping[str, Sequence[WeightEntry]]) -> str | None:
    """Names two methods with different tensors of the same name; ``None`` if there are none.

    A runner shares tensors by name, so one of the two methods would get the wrong one. Compilers number the constants
    that they make from a method's count of buffers, so methods of different modules can arrive at the same name.

    Args:
        weights: each method's tensors, by method.
    """
    first: dict[str, tuple[str, WeightEntry]] = {}
    for method, entries in weights.items():
        for entry in entries:
            other, known = first.setdefault(entry.fqn, (method, entry))
            if known != entry:
                return f"{other} and {method} hold different tensors named {entry.fqn}; export one of them on its own"
    return None


def check_pt2(path: Path, arch: GpuArch) -> None:
    """Checks the code in an AOTInductor package.

    Raises:
        SelfCheckError: the check failed; the text names the first problem.
    """
    with zipfile.ZipFile(path) as archive:
        libraries = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
    if len(libraries) != 1:
        raise SelfCheckError(f"{path.name} holds {len(libraries)} shared libraries; one was expected")
    library = read_library(libraries[0])
    for problem in _code_problems(library, arch):
        raise SelfCheckError(f"{path.name}: {problem}")
    if "libtorch_cuda.so" not in library.needed:
        raise SelfCheckError(f"{path.name}: not linked with libtorch_cuda.so")


def _method_problems(method: Method, arch: GpuArch, foreign: frozenset[str]) -> Iterator[str]:
    if method.delegates != ("CudaBackend",):
        yield f"delegates are {method.delegates}; one CudaBackend was expected"
    others = [operator for operator in method.operators if operator.removesuffix(".out") not in COPY_OPERATORS]
    if others:
        yield f"operators left outside the delegate: {', '.join(others)}"
    yield from _code_problems(method.library, arch)
    missing = missing_shims(method.library.undefined)
    if missing:
        yield f"ExecuTorch's runtime does not provide {', '.join(missing)}"
    used = sorted({kernel for cubin in method.library.cubins for kernel in cubin.kernels} & foreign)
    if used:
        yield f"kernels of ExecuTorch's own were compiled in: {', '.join(used)}"


def _code_problems(library: SharedLibrary, arch: GpuArch) -> Iterator[str]:
    for cubin in library.cubins:
        if cubin.arch != arch.name:
            yield f"kernel {cubin.symbol} was compiled for {cubin.arch}, not {arch.name}"
    wide = find_avx512(library.data)
    if wide:
        yield f"host code uses AVX-512: {wide}"
    path = find_build_path(library.data)
    if path:
        yield f"host code names a folder of this machine: {path}"


def executorch_kernels(called: Collection[str] = ()) -> frozenset[str]:
    """Names of the Triton functions in ExecuTorch's CUDA backend, from all its imported modules.

    Args:
        called: operators that a program calls itself (``triton::int4_matmul``); modules that define them are skipped.
    """
    import executorch.backends.cuda.triton.kernels as package
    from torch._library.custom_ops import CustomOpDef

    names: set[str] = set()
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package.__name__}."):
            values = list(vars(module).values())
            operators = {value._qualname for value in values if isinstance(value, CustomOpDef)}
            if operators.isdisjoint(called):
                names.update(_triton_functions(values, name))
    return frozenset(names)


def _triton_functions(values: Iterable[object], module: str) -> Iterator[str]:
    from triton.runtime import JITFunction

    for value in values:
        while value is not None and not isinstance(value, JITFunction):  # unwrap @triton.autotune
            value = getattr(value, "fn", None) if type(value).__module__.startswith("triton") else None
        if value is not None and value.fn.__module__ == module:
            yield value.__name__


def _called_operators(program: ExportedProgram) -> frozenset[str]:
    """Qualified names (``namespace::name``) of the operators that a program calls, also in regions and branches."""
    return frozenset(
        node.target._schema.name
        for node in all_nodes(program.graph_module)
        if isinstance(node.target, torch._ops.OpOverload)
    )


def can_disassemble() -> bool:
    """Whether ``objdump`` (GNU binutils) is on PATH; without it, host code is not searched for AVX-512."""
    return shutil.which("objdump") is not None


def find_avx512(code: bytes) -> str | None:
    """The first AVX-512 instruction in a shared library; ``None`` if there is none or no objdump."""
    objdump = shutil.which("objdump")
    if objdump is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(code)
        file.flush()
        command = [objdump, "-d", "--no-show-raw-insn", file.name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found = next((line.strip() for line in process.stdout if _AVX512.search(line)), None)
            process.kill()
    return found


# Only AVX-512 has zmm registers, xmm and ymm registers 16 to 31, and mask registers.
_AVX512 = re.compile(r"%zmm\d|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")


def find_build_path(data: bytes) -> str | None:
    """A folder of this machine (home, temporary, Python or working folder) whose path occurs in ``data``."""
    folders = {
        str(Path.home()),
        tempfile.gettempdir(),
        sys.prefix,
        sysconfig.get_paths()["purelib"],
        str(Path.cwd()),
        str(Path(torch.__file__).parents[1]),
    }
    for folder in sorted(folders):
        if len(folder) > 1 and (folder.rstrip("/") + "/").encode() in data:
            return folder
    return None


def _weight_problems(
    contents: PteContents, method: str, program: ExportedProgram, same: set[tuple[str, int]]
) -> Iterator[str]:
    """What is wrong with a method's weights.

    ``same`` gets each key of the ``.ptd`` with the address of the tensor that it was found equal to. What methods share
    is compared once: a large model's weights are read from disk for it.
    """
    values = {**program.constants, **program.state_dict}
    for entry in contents.methods[method].weights:
        if entry.key not in contents.data:
            yield f"the .ptd has no {entry.key}"
            continue
        original = values.get(entry.fqn)
        if not isinstance(original, torch.Tensor):
            continue  # the compiler made this constant, such as a lifted scalar
        if original.dtype != entry.dtype or tuple(original.shape) != entry.shape:
            yield f"{entry.fqn} was written as {entry.dtype} {entry.shape}"
        elif (entry.key, original.data_ptr()) in same:
            continue
        elif _same_bytes(original, entry, contents.data[entry.key]):
            same.add((entry.key, original.data_ptr()))
        else:
            yield f"{entry.fqn} differs from the program's value"
    used = {entry.fqn for entry in contents.methods[method].weights}
    for fqn in mutated_buffers([program]):
        if fqn not in used:
            yield f"mutable buffer {fqn} is not bound by its name, so methods would not share it"


def _same_bytes(original: torch.Tensor, entry: WeightEntry, data: memoryview) -> bool:
    """Compares dense tensors in pieces, without copying them whole, and others through a strided view."""
    if original.numel() == 0:
        return True
    original = original.detach().cpu()
    dense = original.is_contiguous() and entry.storage_offset == 0 and entry.strides == original.stride()
    storage = original.untyped_storage()
    if dense and len(data) == storage.nbytes() and (mapped := mapped_file(storage)) is not None:
        return sha256_of(data) == mapped[1]
    if not dense:
        written = torch.frombuffer(bytearray(data), dtype=entry.dtype)
        view = written.as_strided(entry.shape, entry.strides, entry.storage_offset)
        return bool(torch.equal(_bits(view.contiguous()), _bits(original.contiguous())))
    flat = _bits(original)
    if len(data) < flat.numel():
        return False
    for start in range(0, flat.numel(), _COMPARE_BYTES):
        piece = flat[start : start + _COMPARE_BYTES]
        if piece.numpy().tobytes() != data[start : start + piece.numel()]:
            return False
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
