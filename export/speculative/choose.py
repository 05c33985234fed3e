"""Decides from the target's logits how many of a draft's proposals are accepted and which token follows them.

The draft proposes its most likely token at each position, so its distribution is a single point. Speculative sampling
(Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) then accepts proposal x with its probability p(x)
under the target. After a rejection it draws from p without x, renormalized. The result has the distribution p for any
draft. In greedy decoding p is a single point, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

Choose = Callable[[torch.Tensor, Sequence[int]], tuple[int, int]]
"""(logits [R, V], R - 1 proposals) -> number of accepted proposals, and the token after the last accepted one."""


def greedy(logits: torch.Tensor, proposals: Sequence[int]) -> tuple[int, int]:
    """Accepts proposals until one is not the target's most likely token.

    Args:
        logits: [R, V]; row i follows the first i proposals.
        proposals: R - 1 tokens.

    Returns:
        The number of accepted proposals, and the target's most likely token after them.
    """
    best = logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(proposals) and proposals[accepted] == best[accepted]:
        accepted += 1
    return accepted, best[accepted]


@dataclasses.dataclass
class Sampler:
    """Draws from the target's distribution, with rejection sampling for proposals; call it like :func:`greedy`.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: keep only this many of the most likely tokens; 0 for all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this; 1.0 for all.
        generator: random number generator on the device of the logits; ``None`` for PyTorch's default.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0; decode greedily for 0")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Turns logits [R, V] into the distribution to draw from, float64 [R, V] on the same device."""
        scores = logits.detach().to(torch.float64) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        p = scores.softmax(-1)
        if self.top_p < 1:
            ordered, ids = p.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            p = p.scatter(-1, ids, ordered.masked_fill(before >= self.top_p, 0.0))
            p = p / p.sum(-1, keepdim=True)
        return p

    def __call__(self, logits: torch.Tensor, proposals: Sequence[int]) -> tuple[int, int]:
        """Accepts proposals at random and draws the token after them.

        Args:
            logits: [R, V]; row i follows the first i proposals.
            proposals: R - 1 tokens.

        Returns:
            The number of accepted proposals, and the token after them.
        """
        p = self.probabilities(logits)
        rows = torch.arange(len(proposals), device=p.device)
        given = p[rows, torch.tensor(list(proposals), dtype=torch.int64, device=p.device)].tolist()
        for index, token in enumerate(proposals):
            draw = torch.rand((), dtype=torch.float64, device=p.device, generator=self.generator)
            # "<", not "<=": a token of probability 0 is never accepted, and one of probability 1 always is
            if float(draw) < given[index]:
                continue
            rest = p[index].clone()
            rest[token] = 0.0
            return index, self._draw(rest)
        return len(proposals), self._draw(p[len(proposals)])

    def _draw(self, weights: torch.Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self.generator))
