"""Counts how many of a draft's proposals were accepted."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Acceptance:
    """Counts over the rounds of one generation.

    Attributes:
        chain: K, most proposals in a round.
        offered: number of proposals in each round (fewer than K near the end).
        accepted: number of accepted proposals in each round.
    """

    chain: int
    offered: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)

    def record(self, offered: int, accepted: int) -> None:
        """Adds one round."""
        self.offered.append(offered)
        self.accepted.append(accepted)

    @property
    def rounds(self) -> int:
        """Number of ``target_verify`` calls."""
        return len(self.offered)

    @property
    def mean_accepted_length(self) -> float:
        """Mean tokens per round, which are the accepted ones and the target's own; 0.0 before the first round."""
        return (sum(self.accepted) + self.rounds) / self.rounds if self.rounds else 0.0

    @property
    def per_position(self) -> list[float | None]:
        """For each position of the chain, the share of proposals there that were accepted.

        A proposal counts as accepted only together with all before it, so the shares never increase if every round
        proposed K tokens. ``None`` marks a position that no round reached.
        """
        shares: list[float | None] = []
        for position in range(self.chain):
            reached = [a for o, a in zip(self.offered, self.accepted, strict=True) if o > position]
            shares.append(sum(a > position for a in reached) / len(reached) if reached else None)
        return shares
