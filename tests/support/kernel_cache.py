"""One cache of compiled Triton kernels for all lowerings of a test run.

Each lowering compiles its kernels in a folder of its own, so that nothing of the machine enters a program. Tests lower
dozens of small programs with the same few kernels, whose compiling took most of the time. Triton finds a kernel by its
source, its options and the versions of the compilers, so a program is the same whoever compiled them. Tests marked
``host_code``, which compare bytes, and processes that a test starts compile their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from shared_folders import shared_folder

from flashpte.export.lowering.cross_compile import session

KERNELS = "FLASHPTE_TEST_KERNELS"
"""Variable of the environment with the cache's folder, which all processes of a test run share."""

_ENVIRONMENT = session._environment


@contextlib.contextmanager
def shared_kernels() -> Iterator[None]:
    """Inside, lowering in this process takes kernels from the cache and adds to it."""

    @contextlib.contextmanager
    def environment(cuda_home: Path, work_dir: Path) -> Iterator[None]:
        place = work_dir / "triton"  # where a lowering makes Triton keep them
        if not place.exists():
            place.symlink_to(shared_folder(KERNELS))
        with _ENVIRONMENT(cuda_home, work_dir):
            yield

    with mock.patch.object(session, "_environment", environment):
        yield


@contextlib.contextmanager
def own_kernels() -> Iterator[None]:
    """Inside, lowering compiles its kernels as users do, also inside of :func:`shared_kernels`."""
    with mock.patch.object(session, "_environment", _ENVIRONMENT):
        yield
