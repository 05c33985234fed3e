"""Compiles the methods of an ExecuTorch program beside each other, one process per method.

ExecuTorch compiles one method after the other in one process, and one core is busy. Here each method is compiled in a
process forked from this one, so that it starts with the program and all weights in (shared) memory. It does all that
ExecuTorch does for a method up to the point where AOTInductor has written the library, and sends back the library's
path and what each weight is: by address if this process has it too, else by value.

This process then runs ExecuTorch's own code for every method, in their order, on a program without an operator, and
answers its call of AOTInductor with what the method's process sent. A method whose process failed is compiled here, so
its error is the one that a user sees. The bytes are the same as without processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram

from flashpte.export.lowering.cross_compile import forked
from flashpte.export.lowering.cross_compile.host_weights import HostBackedCuda, host_backed, host_storages
from flashpte.export.lowering.cross_compile.override_table import Target

_logger = logging.getLogger("flashpte.lowering")


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One weight of a compiled method.

    Attributes:
        storage: the address of its storage if the parent has it too, else the storage's bytes. (A tensor would be sent
            as a handle to memory of this process, which may end before the parent asks for it.)
        layout: size, strides and offset in the storage, in elements.
        dtype: element type.
        on_gpu: whether it is a :class:`HostBackedCuda`.
        properties: AOTInductor's ``TensorProperties``.
    """

    storage: int | bytes
    layout: tuple[Sequence[int], Sequence[int], int]
    dtype: torch.dtype
    on_gpu: bool
    properties: Any


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What the process of a method sends: the library's path and the weights by FQN."""

    library: str
    weights: dict[str, _Weight]


@dataclasses.dataclass(frozen=True)
class _Failed:
    """What the process of a method sends instead if an error ends it: the error with its traceback."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """What the process of a method sends while it compiles kernels."""

    done: int
    total: int


class _Done(Exception):
    """Ends ExecuTorch's code in a method's process once the library is written and checked."""


def compile_beside(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``CudaBackend.preprocess_multimethod``: compiles several methods in processes of their own."""

    def preprocess_multimethod(
        edge_programs: Mapping[str, Sequence[ExportedProgram]], compile_specs: Mapping[str, Sequence[Any]]
    ) -> Any:
        jobs = [
            (program, specs)
            for name, programs in edge_programs.items()
            for program, specs in zip(programs, compile_specs[name], strict=True)
        ]
        count = min(target.processes, len(jobs))
        if count < 2 or not forked.can_fork():
            return original(edge_programs, compile_specs)
        storages = host_storages(program for program, _ in jobs)
        with _answering(_compile_all(target, jobs, storages, count), storages):
            return original(edge_programs, compile_specs)

    return preprocess_multimethod


def _compile_all(
    target: Target,
    jobs: Sequence[tuple[ExportedProgram, Any]],
    known: Mapping[int, torch.UntypedStorage],
    count: int,
) -> dict[int, _Compiled]:
    """Compiles programs in ``count`` processes; returns what they sent by the program's ``id``."""
    folder = target.work_dir / "methods"
    folder.mkdir(exist_ok=True)
    waiting = list(enumerate(jobs))
    running: dict[connection.Connection, int] = {}
    processes: list[BaseProcess] = []
    compiled: dict[int, _Compiled] = {}
    kernels: dict[connection.Connection, _Kernels] = {}
    try:
        while waiting or running:
            while waiting and len(running) < count:
                number, (program, specs) = waiting.pop(0)
                receive, send = connection.Pipe(duplex=False)
                arguments = (target, program, specs, known, folder / f"{number}.so", count, send)
                if not forked.start(processes, _work, arguments, daemon=False):
                    return compiled  # the other methods are compiled in this process
                send.close()
                running[receive] = id(program)
            for ready, message in forked.received(running):
                if isinstance(message, _Compiled):
                    compiled[running[ready]] = message
                elif isinstance(message, _Failed):
                    _logger.info("the process of a method failed, so it is compiled in this one:\n%s", message.text)
                elif isinstance(message, _Kernels):
                    kernels[ready] = message
                    target.on_kernels(sum(k.done for k in kernels.values()), sum(k.total for k in kernels.values()))
                elif target.on_wrapper is not None:
                    target.on_wrapper(message)
    finally:
        forked.end(processes)
    return compiled


def _work(
    target: Target,
    program: ExportedProgram,
    specs: Any,
    known: Mapping[int, torch.UntypedStorage],
    library: Path,
    count: int,
    results: connection.Connection,
) -> None:
    """Compiles one program and sends its host code, then a :class:`_Compiled`; sends less if it fails."""
    from executorch.backends.cuda.cuda_backend import CudaBackend
    from executorch.backends.cuda.cuda_weight_collector import CudaWeightCollector
    from torch.export.pt2_archive._package_weights import Weights

    forked.become_worker()
    # Inductor names a folder after a part of the host code that methods may share, and writes all cubins to one file in
    # it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(library.with_suffix(""))
    target.processes = max(1, target.processes // count)
    target.on_wrapper = results.send
    target.on_kernels = lambda done, total: results.send(_Kernels(done, total))
    found: dict[str, _Weight] = {}

    def record(paths: Any, compile_specs: Any) -> Any:
        """Replaces ``materialize_weights_blob``, which would write the weights."""
        for weights in (path for path in paths if isinstance(path, Weights)):
            found.update({name: _describe(entry[0], entry[1], known) for name, entry in weights.items()})
        written = next(path for path in paths if isinstance(path, str) and path.endswith(".wrapper.so"))
        shutil.copyfile(written, library)  # ExecuTorch deletes its own
        return [written, f"{written.removesuffix('.so')}_weights.blob"]

    def finish(*args: Any) -> Any:
        """Replaces ``codesign_so``, the first call after the check for missing kernels."""
        raise _Done

    try:
        with (
            mock.patch.object(CudaBackend, "materialize_weights_blob", record),
            mock.patch.object(CudaBackend, "codesign_so", finish),
        ):
            CudaBackend._preprocess_with_weight_collector(program, specs, CudaWeightCollector())
    except _Done:
        results.send(_Compiled(str(library), found))
    except Exception:
        results.send(_Failed(traceback.format_exc()))


def _describe(tensor: torch.Tensor, properties: Any, known: Mapping[int, torch.UntypedStorage]) -> _Weight:
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    octets = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return _Weight(
        storage=address if address in known else octets.numpy().tobytes(),
        layout=(tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset())),
        dtype=tensor.dtype,
        on_gpu=isinstance(tensor, HostBackedCuda),
        properties=properties,
    )


@contextlib.contextmanager
def _answering(compiled: Mapping[int, _Compiled], storages: Mapping[int, torch.UntypedStorage]) -> Iterator[None]:
    """Inside, ExecuTorch compiles nothing for a program that is in ``compiled``."""
    from executorch.backends.cuda.cuda_backend import CudaBackend

    stand_in = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    preprocess = CudaBackend._preprocess_with_weight_collector
    aot_compile = torch._inductor.aot_compile
    answers: list[_Compiled] = []

    def with_answer(program: ExportedProgram, specs: Any, collector: Any) -> Any:
        answer = compiled.get(id(program))
        if answer is None:
            return preprocess(program, specs, collector)
        answers.append(answer)
        return preprocess(stand_in, specs, collector)

    def answer_or_compile(*args: Any, **kwargs: Any) -> Any:
        return _paths(answers.pop(), storages) if answers else aot_compile(*args, **kwargs)

    with (
        mock.patch.object(CudaBackend, "_preprocess_with_weight_collector", with_answer),
        mock.patch.object(torch._inductor, "aot_compile", answer_or_compile),
    ):
        yield


def _paths(answer: _Compiled, storages: Mapping[int, torch.UntypedStorage]) -> list[Any]:
    """What AOTInductor would have returned: the library's path and the weights."""
    from torch.export.pt2_archive._package_weights import Weights

    library = Path(answer.library).with_suffix(".wrapper.so")
    os.replace(answer.library, library)
    weights = {name: (_tensor(weight, storages), weight.properties) for name, weight in answer.weights.items()}
    return [str(library), Weights(weights)]


def _tensor(weight: _Weight, storages: Mapping[int, torch.UntypedStorage]) -> torch.Tensor:
    size, strides, offset = weight.layout
    if isinstance(weight.storage, int):
        storage = storages[weight.storage]
    else:
        octets = bytearray(weight.storage)
        storage = torch.frombuffer(octets, dtype=torch.uint8).untyped_storage() if octets else torch.UntypedStorage()
    tensor = torch.empty(0, dtype=weight.dtype).set_(storage, offset, size, strides)
    return host_backed(tensor) if weight.on_gpu else tensor
