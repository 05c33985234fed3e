"""Switches the process to compiling for a GPU that it does not have, and back."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from flashpte.export.lowering.cross_compile import override_table, overrides
from flashpte.export.lowering.cross_compile.answers import Answer
from flashpte.export.lowering.cross_compile.device_guard import ensure_cuda_device_guard
from flashpte.export.lowering.cross_compile.forget_device import forget_device
from flashpte.export.lowering.cross_compile.gemm_choice import make_chooser
from flashpte.export.lowering.cross_compile.toolchain import (
    CrossCompileError,
    ReproducibleFlags,
    compiler_program,
    find_triton_tool,
    make_cuda_home,
    make_stub_library,
)
from flashpte.kernels.tuning import GpuArch

_ONE_AT_A_TIME = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Setting:
    """One option of ``torch._inductor.config``, its value, and why it is set."""

    name: str
    value: Any
    why: str


SETTINGS: tuple[Setting, ...] = (
    Setting("compile_threads", 1, "its worker processes would not see the overrides"),
    Setting("triton.autotune_at_compile_time", True, "kernels are compiled from Python, so that they can be saved"),
    Setting("always_keep_tensor_constants", True, "a small constant would be read for inlining; it is fake"),
    Setting("joint_graph_constant_folding", False, "folding computes with constants; they are fake"),
    Setting("fx_graph_cache", False, "a cached graph may come from another target"),
    Setting("autotune_local_cache", False, "choices must not depend on what ran before"),
    Setting("autotune_remote_cache", False, "choices must not depend on what ran before"),
    Setting("shape_padding", False, "decides by benchmark"),
    Setting("benchmark_epilogue_fusion", False, "decides by benchmark"),
    Setting(
        "prologue_fusion",
        False,
        "without a benchmark to prevent it, a normalization or activation is computed anew for every column of tiles "
        "of the matrix product that reads it: 30% to 140% slower on an H200",
    ),
    Setting(
        "combo_kernels",
        True,
        "pointwise kernels that do not depend on each other become one: RoPE of q and k and the write to the cache",
    ),
    Setting("benchmark_combo_kernel", False, "decides by benchmark"),
    Setting("combo_kernel_allow_mixed_sizes", 2, "q, k and v differ in size"),
    Setting("coordinate_descent_tuning", False, "decides by benchmark"),
    Setting("aot_inductor.allow_stack_allocation", False, "ExecuTorch's runtime has no shim for it"),
    Setting("aot_inductor.precompile_headers", False, "they go into a shared folder and save nothing here"),
    Setting(
        "cpp_cache_precompile_headers", False, "defines a macro that includes more headers; pays only with precompiling"
    ),
)


@contextlib.contextmanager
def cross_compile(
    arch: GpuArch,
    work_dir: Path,
    package: Literal["pte", "pt2"] = "pte",
    restore_views: bool = True,
    on_wrapper: Callable[[str], None] | None = None,
    on_kernels: Callable[[int, int], None] | None = None,
    answers: Mapping[str, Answer] | None = None,
    keep: Callable[[Answer], None] | None = None,
) -> Iterator[None]:
    """Inside, PyTorch, Triton and ExecuTorch compile for ``arch``, with or without a GPU.

    Args:
        arch: architecture to compile for.
        work_dir: an empty folder for caches and intermediate files, including weights.
        package: ``pte`` for ExecuTorch's CUDA backend, ``pt2`` for a plain AOTInductor package.
        restore_views: pass views to kernels as strides (``pte`` only; a ``pt2`` program already has views).
        on_wrapper: called with the C++ source of each compiled program's wrapper.
        on_kernels: called with how many of the kernels known so far are compiled, and how many are known.
        answers: compiled methods by name; ExecuTorch's backend gets them instead of compiling these methods (``pte``
            only). Their libraries must be in ``work_dir``, and are taken away.
        keep: called with the answer of the only method that is lowered, which ends the lowering with a
            :class:`~.methods.MethodKept` (``pte`` only).

    Raises:
        CrossCompileError: a compiler or header is missing, PyTorch no longer has a name that must be replaced, or
            another thread is lowering (the overrides are global to the process).
    """
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise CrossCompileError("another lowering is running in this process: run them one after the other")
    try:
        cuda_home = work_dir / "cuda"
        make_cuda_home(cuda_home)
        flags = _flags(work_dir, package)
        target = override_table.Target(arch, work_dir, str(cuda_home), flags, restore_views)
        target.on_wrapper, target.answers, target.keep = on_wrapper, answers or {}, keep
        if on_kernels is not None:
            target.on_kernels = on_kernels
        table = overrides.TABLE + (overrides.EXECUTORCH_TABLE if package == "pte" else overrides.PT2_TABLE)
        with contextlib.ExitStack() as stack:
            stack.callback(forget_device)
            ensure_cuda_device_guard()
            _initialise_device_interfaces()
            stack.enter_context(override_table.apply(table, target))
            stack.enter_context(_environment(cuda_home, work_dir))
            stack.enter_context(_inductor(arch, package))
            forget_device()
            yield
    finally:
        _ONE_AT_A_TIME.release()


def _flags(work_dir: Path, package: str) -> ReproducibleFlags:
    # Longer prefixes come after shorter ones: if two maps match, gcc takes the later one.
    prefixes = {
        sys.prefix: "python",
        sysconfig.get_paths()["purelib"]: "site-packages",
        str(Path(torch.__file__).parents[1]): "site-packages",
        str(work_dir): "build",
        str(work_dir.resolve()): "build",
    }
    if package == "pte":
        return ReproducibleFlags(prefixes)
    return ReproducibleFlags(prefixes, link_first=_libtorch_cuda(work_dir))


def _libtorch_cuda(work_dir: Path) -> list[str]:
    """Link arguments that make a package depend on libtorch_cuda.so, even if it calls nothing in it.

    A CPU build of PyTorch does not have the library, so a stub stands for it.
    """
    folder = Path(torch.__file__).parent / "lib"
    if torch.version.cuda is None:
        folder = work_dir / "libtorch"
        make_stub_library(folder / "libtorch_cuda.so", "libtorch_cuda.so", ("flashpte_stub_of_libtorch_cuda",))
    return [f"-L{folder}", "-Wl,--no-as-needed", "-ltorch_cuda"]


def _initialise_device_interfaces() -> None:
    from torch._dynamo.device_interface import get_interface_for_device

    get_interface_for_device("cpu")  # its first call registers all interfaces and would overwrite the overrides


@contextlib.contextmanager
def _environment(cuda_home: Path, work_dir: Path) -> Iterator[None]:
    changes = {
        "CUDA_HOME": str(cuda_home),
        "TORCHINDUCTOR_CACHE_DIR": str(work_dir / "inductor"),
        "TRITON_CACHE_DIR": str(work_dir / "triton"),
        # Line tables in a cubin hold the path of the kernel's source file.
        "TRITON_DISABLE_LINE_INFO": "1",
        # CUDA builds of PyTorch prefer the assembler that they bring.
        "TRITON_PTXAS_PATH": str(find_triton_tool("ptxas")),
        "TRITON_PTXAS_BLACKWELL_PATH": str(find_triton_tool("ptxas-blackwell")),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _changed_settings(config: Any) -> dict[str, Any]:
    """Inductor's options that the process has changed, with their defaults.

    A library may change them for everybody: torchao's GPTQ asks for exact division, its ``quantize_`` for more tuning.
    """
    return {
        name: copy.deepcopy(entry.default)
        for name, entry in config._config.items()
        if entry.alias is None and not config._is_default(name)
    }


@contextlib.contextmanager
def _inductor(arch: GpuArch, package: str) -> Iterator[None]:
    """Sets Inductor's configuration, clears its caches and installs the chooser of matrix-multiply tiles."""
    import torch._inductor.config as config
    from torch._inductor import select_algorithm
    from torch._inductor.utils import clear_caches

    settings = _changed_settings(config) | {setting.name: setting.value for setting in SETTINGS}
    settings["cuda.arch"] = str(arch.number)
    settings["cpp.cxx"] = (compiler_program(),)
    # ExecuTorch has no matrix multiply, so each one must become a Triton template. A plain AOTInductor package calls
    # cuBLAS, which libtorch brings.
    settings["max_autotune_gemm"] = package == "pte"
    # These add layout checks, which an environment variable turns on at run time. For the result of a torch.cond, 2.15
    # adds checks that need a shim that ExecuTorch's runtime lacks.
    settings["size_asserts"] = settings["alignment_asserts"] = package != "pte"
    chooser = make_chooser(arch)
    selector = select_algorithm.get_algorithm_selector_cache()
    clear_caches()
    with config.patch(settings):
        selector.add_preprocessing_fn(chooser)
        try:
            yield
        finally:
            if chooser in selector.preprocessing_fns:
                selector.preprocessing_fns.remove(chooser)
            clear_caches()  # entries belong to the target, and to files about to be deleted
