"""Tensors whose bytes are in a file and not in memory: a model may be larger than the memory of the machine.

A tensor is written once, and then mapped. Its pages are read when somebody asks for its values; exporting and lowering
do not. The file stays, with its SHA-256 beside it, so that lowering can link it instead of reading it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

_CHUNK_BYTES = 8 << 20


def write_mapped(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """Writes a tensor to a new file and returns it mapped from there.

    Args:
        tensor: a tensor on the CPU. The file holds its elements in row-major order.
        path: the file, which must stay until the result is no longer used. Nobody may write to the result.

    Raises:
        OSError: the file cannot be written.
    """
    return tensor if tensor.numel() == 0 else write_mapped_parts([tensor], path)  # an empty file cannot be mapped


def write_mapped_parts(parts: Sequence[torch.Tensor], path: Path) -> torch.Tensor:
    """Writes tensors end to end along their first dimension, and returns the whole mapped from there.

    Args:
        parts: tensors on the CPU that differ only in their first size; not all empty. Pages that are read of mapped
            ones leave memory again.
        path: as for :func:`write_mapped`.

    Raises:
        OSError: the file cannot be written.
    """
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in parts:
            whole = part.detach().contiguous()
            mapped = whole.untyped_storage().filename is not None  # pages of a copy are not its own to drop
            octets = whole.view(-1).view(torch.uint8).numpy()
            for start in range(0, octets.size, _CHUNK_BYTES):
                chunk = octets[start : start + _CHUNK_BYTES].data
                digest.update(chunk)
                file.write(chunk)
                if mapped:
                    _drop_pages(chunk)
    _digest_file(path).write_bytes(digest.digest())
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) if parts[0].dim() else ()
    return _mapped(path, shape, parts[0].dtype)


def _mapped(path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(tuple(shape))


def _digest_file(path: Path) -> Path:
    return Path(f"{path}.sha256")


class MappedZeros:
    """Makes tensors of zeros, each in a sparse file of its own, which takes no room on most disks.

    Args:
        folder: folder for the files; as for :func:`write_mapped`, they must stay and nobody may write to the tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._digests: dict[int, bytes] = {}

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeros of a shape and dtype."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.zeros(shape, dtype=dtype)
        path = self._folder / f"zeros-{self._count}"
        self._count += 1
        if size not in self._digests:
            digest, chunk = hashlib.sha256(), bytes(_CHUNK_BYTES)
            for start in range(0, size, _CHUNK_BYTES):
                digest.update(chunk[: size - start])
            self._digests[size] = digest.digest()
        with path.open("xb") as file:
            file.truncate(size)
        _digest_file(path).write_bytes(self._digests[size])
        return _mapped(path, shape, dtype)


def mapped_file(storage: torch.UntypedStorage) -> tuple[Path, bytes] | None:
    """The file that holds a whole storage and its SHA-256, if this module made it."""
    if storage.filename is None:
        return None
    path = Path(storage.filename)
    try:
        digest = _digest_file(path).read_bytes()
    except OSError:
        return None
    return (path, digest) if path.stat().st_size == storage.nbytes() else None


def sha256_of(mapped: memoryview) -> bytes:
    """The SHA-256 of a mapped file's bytes, which leave this process's memory again once they are read."""
    digest = hashlib.sha256()
    for start in range(0, len(mapped), _CHUNK_BYTES):
        chunk = mapped[start : start + _CHUNK_BYTES]
        digest.update(chunk)
        _drop_pages(chunk)
    return digest.digest()


def _drop_pages(mapped: memoryview) -> None:
    address = numpy.frombuffer(mapped, dtype=numpy.uint8).ctypes.data
    first = address - address % mmap.PAGESIZE
    with contextlib.suppress(OSError, AttributeError):  # without it, the pages go when memory is short
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + len(mapped) - first), mmap.MADV_DONTNEED)
