"""Spells options as command-line flags."""

from __future__ import annotations

from flashpte.export.common.errors import Option

_FLAGS = {"random_seed": "--random-weights", "midm_sdpa": "--no-midm-sdpa", "attention": "--no-replace"}
_TAKES = {
    "checkpoint": "DIR",
    "gguf_file": "FILE",
    "config": "FILE",
    "draft": "DIR",
    "verify_window": "M",
    "qlinear": "4w",
}


def flag_name(field: str) -> str:
    """The flag that sets a field of ``ExportOptions``: ``--max-seq-len`` for ``max_seq_len``."""
    return _FLAGS.get(field, f"--{field.replace('_', '-')}")


def spell_flag(option: Option) -> str:
    """The flag and its value (``--max-seq-len 1``); for a wanted option, its placeholder (``--checkpoint DIR``)."""
    shown = _TAKES.get(option.name) if option.wanted else option.value
    return flag_name(option.name) if shown is None else f"{flag_name(option.name)} {shown}"
