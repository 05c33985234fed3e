"""Compiles the methods of an ExecuTorch program beside each other, one process per method.

ExecuTorch compiles one method after the other in one process, and one core is busy. Here each method is compiled in a
process forked from this one, so that it starts with the program and all weights in (shared) memory. It does all that
ExecuTorch does for a method up to the point where AOTInductor has written the library, and sends back its answer
(:mod:`.answers`): the library's path, and the name of each weight in the program.

This process then runs ExecuTorch's own code for every method, in their order, on a program without an operator, and
answers its call of AOTInductor with what the method's process sent. A method whose process failed is compiled here, so
its error is the one that a user sees. An answer may also come from another machine, by a file. The bytes are the same
in each case.
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
from flashpte.export.lowering.cross_compile.answers import Answer, Weight, describe_weight, paths_of
from flashpte.export.lowering.cross_compile.override_table import Target
from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError

_logger = logging.getLogger("flashpte.lowering")


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


class MethodKept(Exception):
    """Ends ExecuTorch's code once a method's answer is with the function that asked for it (``Target.keep``)."""


Job = tuple[ExportedProgram, Any]
"""A program of ExecuTorch's delegate and its compile specs."""


def compile_beside(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``CudaBackend.preprocess_multimethod``: compiles several methods in processes of their own.

    Methods in ``target.answers`` are not compiled. With ``target.keep``, the only method is compiled and kept.
    """

    def preprocess_multimethod(
        edge_programs: Mapping[str, Sequence[ExportedProgram]], compile_specs: Mapping[str, Sequence[Any]]
    ) -> Any:
        jobs = {name: list(zip(programs, compile_specs[name], strict=True)) for name, programs in edge_programs.items()}
        if target.keep is not None:
            kept = [job for name in jobs for job in jobs[name]]
            if len(kept) != 1:
                raise CrossCompileError(f"a method became {len(kept)} delegates; only one can be compiled by itself")
            target.keep(_compile(*kept[0], target.work_dir / "kept.so"))
            raise MethodKept
        answers = {id(job[0]): target.answers[name] for name in jobs for job in jobs[name] if name in target.answers}
        left = [job for name in jobs for job in jobs[name] if name not in target.answers]
        count = min(target.processes, len(left))
        if count >= 2 and forked.can_fork():
            answers |= _compile_all(target, left, count)
        elif not answers:
            return original(edge_programs, compile_specs)
        with _answering(answers):
            return original(edge_programs, compile_specs)

    return preprocess_multimethod


def _compile_all(target: Target, jobs: Sequence[Job], count: int) -> dict[int, Answer]:
    """Compiles programs in ``count`` processes; returns what they sent by the program's ``id``."""
    folder = target.work_dir / "methods"
    folder.mkdir(exist_ok=True)
    waiting = list(enumerate(jobs))
    running: dict[connection.Connection, int] = {}
    processes: list[BaseProcess] = []
    compiled: dict[int, Answer] = {}
    kernels: dict[connection.Connection, _Kernels] = {}
    try:
        while waiting or running:
            while waiting and len(running) < count:
                number, job = waiting.pop(0)
                receive, send = connection.Pipe(duplex=False)
                arguments = (target, job, folder / f"{number}.so", count, send)
                if not forked.start(processes, _work, arguments, daemon=False):
                    return compiled  # the other methods are compiled in this process
                send.close()
                running[receive] = id(job[0])
            for ready, message in forked.received(running):
                if isinstance(message, Answer):
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


def _work(target: Target, job: Job, library: Path, count: int, results: connection.Connection) -> None:
    """Compiles one program and sends its host code, then an :class:`Answer`; sends less if it fails."""
    forked.become_worker()
    # Inductor names a folder after a part of the host code that methods may share, and writes all cubins to one file in
    # it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(library.with_suffix(""))
    target.processes = max(1, target.processes // count)
    target.on_wrapper = results.send
    target.on_kernels = lambda done, total: results.send(_Kernels(done, total))
    try:
        results.send(_compile(*job, library))
    except Exception:
        results.send(_Failed(traceback.format_exc()))


def _compile(program: ExportedProgram, specs: Any, library: Path) -> Answer:
    """Runs ExecuTorch's code for one program up to the written and checked ``library``; writes no weights."""
    from executorch.backends.cuda.cuda_backend import CudaBackend
    from executorch.backends.cuda.cuda_weight_collector import CudaWeightCollector
    from torch.export.pt2_archive._package_weights import Weights

    found: dict[str, Weight] = {}

    def record(paths: Any, compile_specs: Any) -> Any:
        """Replaces ``materialize_weights_blob``, which would write the weights."""
        for weights in (path for path in paths if isinstance(path, Weights)):
            found.update({name: describe_weight(*entry) for name, entry in weights.items()})
        written = next(path for path in paths if isinstance(path, str) and path.endswith(".wrapper.so"))
        shutil.copyfile(written, library)  # ExecuTorch deletes its own
        return [written, f"{written.removesuffix('.so')}_weights.blob"]

    def finish(*args: Any) -> Any:
        """Replaces ``codesign_so``, the first call after the check for missing kernels."""
        raise _Done

    with (
        contextlib.suppress(_Done),
        mock.patch.object(CudaBackend, "materialize_weights_blob", record),
        mock.patch.object(CudaBackend, "codesign_so", finish),
    ):
        CudaBackend._preprocess_with_weight_collector(program, specs, CudaWeightCollector())
    return Answer(str(library), found)


@contextlib.contextmanager
def _answering(answers: Mapping[int, Answer]) -> Iterator[None]:
    """Inside, ExecuTorch compiles nothing for a program whose ``id`` is in ``answers``."""
    from executorch.backends.cuda.cuda_backend import CudaBackend

    stand_in = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    preprocess = CudaBackend._preprocess_with_weight_collector
    aot_compile = torch._inductor.aot_compile
    waiting: list[tuple[Answer, ExportedProgram]] = []

    def with_answer(program: ExportedProgram, specs: Any, collector: Any) -> Any:
        answer = answers.get(id(program))
        if answer is None:
            return preprocess(program, specs, collector)
        waiting.append((answer, program))
        return preprocess(stand_in, specs, collector)

    def answer_or_compile(*args: Any, **kwargs: Any) -> Any:
        return paths_of(*waiting.pop()) if waiting else aot_compile(*args, **kwargs)

    with (
        mock.patch.object(CudaBackend, "_preprocess_with_weight_collector", with_answer),
        mock.patch.object(torch._inductor, "aot_compile", answer_or_compile),
    ):
        yield
