"""How much of what a draft proposed was accepted."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Acceptance:
    """Counts over the rounds of one generation.

    Attributes:
        chain: K.
        offered: for each round, how many tokens were proposed (fewer than K where the end was near).
        accepted: for each round, how many of them were accepted.
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
        """How often ``target_verify`` ran."""
        return len(self.offered)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a round yields: the accepted ones and the target's own. 0.0 before the first round."""
        return (sum(self.accepted) + self.rounds) / self.rounds if self.rounds else 0.0

    @property
    def per_position(self) -> list[float | None]:
        """For each position of the chain, the share of the rounds that proposed a token there and accepted it.

        A token counts only with all before it, so the values descend for rounds that all proposed K. ``None``: no
        round got that far.
        """
        shares: list[float | None] = []
        for position in range(self.chain):
            reached = [a for o, a in zip(self.offered, self.accepted, strict=True) if o > position]
            shares.append(sum(a > position for a in reached) / len(reached) if reached else None)
        return shares
