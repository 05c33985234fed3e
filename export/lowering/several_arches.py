"""Lowers the same programs for several GPU architectures: one folder for each, beside each other if cores are left.

ExecuTorch loads one library per method and has no way to choose among several: a delegate's payload names one
``so_blob`` key. Libraries of two architectures differ in more than machine code. Their tiles, grids, shared memory and
kernels differ, and the host code holds those numbers. So one ``.pte`` is for one architecture. The weights are the same
bytes, and are stored once (hard links).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from flashpte.export.common import cpus
from flashpte.export.common.progress import Counted
from flashpte.export.files.output_folder import atomic_folder
from flashpte.export.lowering.api import LoweredModel
from flashpte.export.lowering.cross_compile import forked

Lower = Callable[[str, Path, Callable[[str], None]], LoweredModel]


def lower_for_each(
    lower: Lower, arches: Sequence[str], output: Path, progress: Callable[[str], None] | None = None, methods: int = 1
) -> tuple[LoweredModel, ...]:
    """Lowers once for each architecture into ``output/<arch>``; all folders appear, or none.

    Args:
        lower: takes an architecture, the folder to write and a function for lines of progress; it calls
            :func:`flashpte.export.lowering.lower`.
        arches: names of architectures, each once.
        output: folder to write; it may hold an earlier export.
        progress: called with a short line at each stage, which begins with the architecture.
        methods: methods of the program, each of which keeps one core busy.

    Returns:
        The finished models, in the order of ``arches``.
    """
    tell = progress or (lambda line: None)
    # A process that is killed may leave a folder of its own in ``scratch``, but none in the result.
    with atomic_folder(output) as (folder, scratch):
        models: dict[str, LoweredModel] = {}
        if cpus.usable_cpus() > methods and forked.can_fork():
            models = _lower_beside(lower, arches, scratch, tell)
        for arch in arches:
            if arch not in models:  # or its process failed: the error is then the one that a user sees
                models[arch] = lower(arch, scratch / arch, functools.partial(_tell_of, tell, arch))
            (scratch / arch).rename(folder / arch)
        _share_equal_files([folder / arch for arch in arches], [models[arch].manifest for arch in arches])
    return tuple(_moved(models[arch], output / arch) for arch in arches)


def _tell_of(tell: Callable[[str], None], arch: str, line: str) -> None:
    tell(line.after(f"{arch}: ") if isinstance(line, Counted) else f"{arch}: {line}")


def _lower_beside(
    lower: Lower, arches: Sequence[str], folder: Path, tell: Callable[[str], None]
) -> dict[str, LoweredModel]:
    """Lowers in one process per architecture, each with its share of the cores; returns what succeeded."""
    running: dict[connection.Connection, str] = {}
    processes: list[BaseProcess] = []
    models: dict[str, LoweredModel] = {}
    cores = sorted(os.sched_getaffinity(0))
    try:
        for number, arch in enumerate(arches):
            receive, send = connection.Pipe(duplex=False)
            share = cores[number :: len(arches)] or cores
            if not forked.start(processes, _work, (lower, arch, folder / arch, share, send), daemon=False):
                break
            send.close()
            running[receive] = arch
        while running:
            for ready, message in forked.received(running):
                arch = running[ready]
                if isinstance(message, LoweredModel):
                    models[arch] = message
                else:
                    _tell_of(tell, arch, message)
    finally:
        forked.end(processes)
    return models


def _work(lower: Lower, arch: str, folder: Path, cores: Sequence[int], results: connection.Connection) -> None:
    forked.become_worker()
    os.sched_setaffinity(0, cores)
    try:
        results.send(lower(arch, folder, results.send))
    except Exception:
        results.send(f"failed, and starts again: {traceback.format_exc().splitlines()[-1]}")


def _share_equal_files(folders: Sequence[Path], manifests: Sequence[Mapping]) -> None:
    """Replaces each file that an earlier folder has with the same bytes by a hard link to it."""
    seen: dict[str, Path] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        for name, described in manifest["files"].items():
            first = seen.setdefault(described["sha256"], folder / name)
            if first != folder / name:
                (folder / name).unlink()
                os.link(first, folder / name)


def _moved(model: LoweredModel, folder: Path) -> LoweredModel:
    """The same model in the place to which its folder was renamed."""
    return dataclasses.replace(
        model,
        folder=folder,
        model=folder / model.model.name,
        weights=None if model.weights is None else folder / model.weights.name,
        manifest_path=folder / model.manifest_path.name,
    )
