"""Goes back to an earlier position of a sequence, for any kind of layer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from flashpte.export.state.layer_state import StateRules

if TYPE_CHECKING:
    import torch

_KEPT = 2


class Rollback:
    """Moves the buffers of a program back to earlier positions of its sequence.

    If every state goes back by a smaller position, there is nothing to do. Otherwise the buffers of the other states
    are copied before a call (:meth:`keep`) and restored, and the caller feeds the tokens after that position again.

    Attributes:
        needed: whether a state goes back only by snapshots.
        most_back: number of positions that every state can go back by; ``None`` for no limit.
        fed_twice: whether every state can take a token again at its own position.
    """

    def __init__(self, states: Iterable[StateRules] = (), buffers: Mapping[str, torch.Tensor] | None = None):
        states = tuple(states)
        by_snapshot = [rules for rules in states if rules.goes_back == "snapshot"]
        self.needed = bool(by_snapshot)
        self.most_back = min((rules.most_back for rules in states if rules.most_back is not None), default=None)
        self.fed_twice = all(rules.fed_twice for rules in states)
        names = [fqn for rules in by_snapshot for fqn in rules.buffers.values()]
        self._buffers = {fqn: (buffers or {})[fqn] for fqn in names}
        self._kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(self, position: int) -> None:
        """Copies the buffers, which hold the state before the token at ``position``."""
        if self.needed:
            self._kept.pop(position, None)
            self._kept[position] = {fqn: buffer.clone() for fqn, buffer in self._buffers.items()}
            for old in sorted(self._kept)[:-_KEPT]:
                del self._kept[old]

    def kept_before(self, position: int) -> list[int]:
        """Positions at or before this one that :meth:`go_back` can restore, latest first."""
        return sorted((kept for kept in self._kept if kept <= position), reverse=True)

    def go_back(self, position: int) -> int:
        """Restores the buffers and returns the position where the next call must start, at or before this one.

        Raises:
            LookupError: no snapshot is early enough.
        """
        if not self.needed:
            return position
        found = self.kept_before(position)
        if not found:
            raise LookupError(f"no snapshot at or before position {position}")
        for fqn, value in self._kept[found[0]].items():
            self._buffers[fqn].copy_(value)
        self._kept = {kept: value for kept, value in self._kept.items() if kept <= found[0]}
        return found[0]

    def forget(self) -> None:
        """Drops all snapshots, for a new sequence."""
        self._kept.clear()
