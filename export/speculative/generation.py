"""What generating gives, with a draft or without, and what it took."""

from __future__ import annotations

import dataclasses
import enum

from flashpte.export.speculative.acceptance import Acceptance


class Stop(enum.StrEnum):
    """Why a generation ended."""

    STOP_TOKEN = "stop token"
    LENGTH = "length"
    CACHE_FULL = "cache full"


@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens, and the times of their steps in seconds.

    Attributes:
        tokens: the new tokens, without the prompt; a stop token is the last of them.
        stopped: why it ended.
        prefill_s: until the prompt's logits were there.
        first_token_s: until the first tokens were chosen, from the same start.
        steps: of each later step, how many tokens it gave and how long it took.
        acceptance: how much of the draft's proposals was accepted; ``None`` for plain decoding.
        forced: how many proposals a round accepted whatever the target said; ``None``: it had its way.
    """

    tokens: tuple[int, ...]
    stopped: Stop
    prefill_s: float
    first_token_s: float
    steps: tuple[tuple[int, float], ...] = ()
    acceptance: Acceptance | None = None
    forced: int | None = None

    @property
    def later(self) -> int:
        """How many tokens came after the first ones."""
        return sum(count for count, _ in self.steps)

    @property
    def later_s(self) -> float:
        """How long those took."""
        return sum(seconds for _, seconds in self.steps)

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first tokens; ``None`` if there were no more, or no time passed."""
        return self.later / self.later_s if self.later and self.later_s > 0 else None

    @property
    def name(self) -> str:
        """For tables."""
        if self.acceptance is None:
            return "plain decode"
        return "speculative" if self.forced is None else f"forced acceptance {self.forced}"
