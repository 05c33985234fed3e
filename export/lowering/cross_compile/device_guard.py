"""Makes fake "cuda" tensors usable on any build of PyTorch, by giving the dispatcher a CUDA device guard."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError, compiler_version, find_compiler

_SOURCE = Path(__file__).with_name("noop_cuda_guard.cpp")


def ensure_cuda_device_guard() -> None:
    """Registers a CUDA device guard if this build of PyTorch has none; it stays for the life of the process."""
    if torch.version.cuda is None:
        _load_noop_guard()
    else:
        # FakeTensorMode calls this on entry; it sets PyTorch's own guard, which never touches the runtime.
        torch._C._ensureCUDADeviceGuardSet()


@functools.cache
def _load_noop_guard() -> ctypes.CDLL:
    with _cache_folder() as folder:
        library = folder / f"noop_cuda_guard-{_build_key()}.so"
        if not library.exists():
            _build(library)
        return ctypes.CDLL(str(library))


def _build_key() -> str:
    """Hashes everything that the binary depends on: its source, PyTorch's version and the compiler's."""
    parts = (_SOURCE.read_text(), torch.__version__, compiler_version(find_compiler()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _cache_folder() -> Iterator[Path]:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "flashpte"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:  # a read-only home: build once per process; a loaded library outlives its file
        with tempfile.TemporaryDirectory(prefix="flashpte-guard-") as once:
            yield Path(once)
    else:
        yield folder


def _build(library: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / "guard.so"
        # PyTorch's headers need C++20 from 2.12 on; 2.11's accept it.
        command = [*find_compiler(), "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'include'}", str(_SOURCE)]
        command += ["-o", str(built), f"-L{root / 'lib'}", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CrossCompileError(f"cannot build the CUDA device guard: {done.stderr.strip().splitlines()[:1]}")
        os.replace(built, library)  # another process may have built the same file; either one works
