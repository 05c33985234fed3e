"""Dtypes and their names in files."""

from __future__ import annotations

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype: ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def read_dtype(name: str) -> torch.dtype:
    """The dtype of a name: ``torch.bfloat16`` for ``"bfloat16"``.

    Raises:
        ValueError: there is no such dtype.
    """
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return found
