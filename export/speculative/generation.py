"""The result of generating text, with or without a draft, and its times."""

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
        tokens: the new tokens, without the prompt; a stop token is the last one.
        stopped: why the generation ended.
        prefill_s: time until the prompt's logits were ready.
        first_token_s: time until the first tokens were chosen, from the same start.
        steps: number of tokens and time of each later step.
        acceptance: counts of accepted proposals; ``None`` for plain decoding.
        forced: number of proposals that every round accepted regardless of the target; ``None`` if the target decided.
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
        """Number of tokens after the first step."""
        return sum(count for count, _ in self.steps)

    @property
    def later_s(self) -> float:
        """Time of the steps after the first, in seconds."""
        return sum(seconds for _, seconds in self.steps)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second after the first step; ``None`` if there were no more tokens or no time passed."""
        return self.later / self.later_s if self.later and self.later_s > 0 else None

    @property
    def name(self) -> str:
        """The run's name in tables."""
        if self.acceptance is None:
            return "plain decode"
        return "speculative" if self.forced is None else f"forced acceptance {self.forced}"
