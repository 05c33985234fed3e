"""What a tile choice needs to know of a GPU architecture.

Numbers are the CUDA programming guide's (shared memory a block may opt in to) and the multiprocessor counts of the
data-centre or largest consumer part. They come from this table even where a GPU is present, so that a program built
beside a GPU is the program built without one.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class ArchLimits:
    """Limits of one architecture.

    Attributes:
        name: ``"sm_90"``.
        multiprocessors: how many programs run at once if each takes a whole one.
        shared_memory: bytes of shared memory one program can have.
    """

    name: str
    multiprocessors: int
    shared_memory: int


_TABLE = {
    arch.name: arch
    for arch in (
        ArchLimits("sm_80", 108, 166_912),
        ArchLimits("sm_86", 84, 101_376),
        ArchLimits("sm_89", 128, 101_376),
        ArchLimits("sm_90", 132, 232_448),
        ArchLimits("sm_100", 148, 232_448),
        ArchLimits("sm_120", 170, 101_376),
    )
}


def limits(arch: str) -> ArchLimits:
    """The limits of ``arch``; an architecture not in the table gets those of the nearest older one in it.

    Raises:
        ValueError: ``arch`` is not of the form ``sm_NN`` or older than every entry.
    """
    if arch in _TABLE:
        return _TABLE[arch]
    number = arch.removeprefix("sm_")
    if not number.isdigit():
        raise ValueError(f"not an architecture: {arch!r} (expected sm_NN)")
    older = [a for a in _TABLE.values() if int(a.name[3:]) <= int(number)]
    if not older:
        raise ValueError(f"{arch} is older than every supported architecture ({', '.join(_TABLE)})")
    return max(older, key=lambda a: int(a.name[3:]))


def current_arch(device: torch.device) -> ArchLimits:
    """The architecture that code for ``device`` is being made for.

    On CUDA it is what ``torch.cuda`` reports, which cross-compiling sets to its target. On a CPU (the interpreter) it
    is sm_90.
    """
    if device.type != "cuda":
        return _TABLE["sm_90"]
    major, minor = torch.cuda.get_device_capability(device)
    return limits(f"sm_{major}{minor}")
