"""The sizes of a program that the loop needs, from its constant methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flashpte.export.common.errors import ExportError, wanted


@dataclasses.dataclass(frozen=True)
class SpeculativeProgram:
    """Sizes of a program with a draft; the constant method ``get_<name>`` returns each.

    Attributes:
        chain_len: K, most tokens that the draft proposes at a time; ``target_verify`` takes K + 1.
        max_seq_len: positions that the caches hold.
        min_prefill_chunk: fewest tokens of one ``prefill``.
        max_prefill_chunk: most tokens of one ``prefill``.
        max_draft_tokens: most rows of one ``draft_decode``.
    """

    chain_len: int
    max_seq_len: int
    min_prefill_chunk: int
    max_prefill_chunk: int
    max_draft_tokens: int

    @classmethod
    def from_constants(cls, constants: Mapping[str, Any]) -> SpeculativeProgram:
        """Reads the sizes from the values of a program's constant methods, by name.

        Raises:
            ExportError: a size is missing, because the program was exported without a draft.
        """
        values = {}
        for field in dataclasses.fields(cls):
            name = f"get_{field.name}"
            if name not in constants:
                raise ExportError(f"the program has no {name}: it was exported without a draft (", wanted("draft"), ")")
            values[field.name] = int(constants[name])
        return cls(**values)

    @property
    def verify_window(self) -> int:
        """Tokens of one ``target_verify``."""
        return self.chain_len + 1
