"""Looks up the architecture to compile for; asks a driver only if a GPU is present."""

from __future__ import annotations

import difflib

import torch

from flashpte.export.common.errors import UsageError
from flashpte.kernels.tuning import ARCHES, GpuArch

DEFAULT_ARCH = "sm_90"


class UnknownArchError(UsageError, ValueError):
    """The architecture's name is not in :data:`flashpte.kernels.tuning.ARCHES`."""


def find_arch(name: str | None) -> GpuArch:
    """Looks up an architecture by name; ``None`` means the local GPU's, or sm_90 on a machine without one.

    Raises:
        UnknownArchError: the name, or the local GPU's architecture, is not in the table.
    """
    known = ", ".join(ARCHES)
    if name is None:
        if not torch.cuda.is_available():
            return ARCHES[DEFAULT_ARCH]
        major, minor = torch.cuda.get_device_capability()
        local = f"sm_{major}{minor}"
        if local not in ARCHES:
            raise UnknownArchError(f"the local GPU is {local}, which is not supported; name one of {known}")
        return ARCHES[local]
    if name in ARCHES:
        return ARCHES[name]
    close = difflib.get_close_matches(name.lower().replace("sm", "sm_").replace("__", "_"), ARCHES, n=1)
    if not close:
        close = difflib.get_close_matches(name, ARCHES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UnknownArchError(f"unknown arch {name!r}{hint} (known: {known})")
