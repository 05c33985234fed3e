"""Perplexity of a text: the exponential of a language model's mean loss per token.

The text is divided into windows that do not overlap. The first token of a window is only fed, and each other one is
predicted from the tokens before it in the window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashpte.export.common.errors import ProgramError, UsageError
from flashpte.export.common.options import TARGET_VERIFY
from flashpte.export.runtime.language_model import LanguageModel

DEFAULT_WINDOW = 2048
"""Most tokens of a window."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The loss of a text.

    Attributes:
        loss: sum of the predicted tokens' losses, in nats.
        predicted: number of predicted tokens.
        tokens: number of tokens of the text.
        window: most tokens of a window.
    """

    loss: float
    predicted: int
    tokens: int
    window: int

    @property
    def value(self) -> float:
        """The perplexity; infinite if a token had no probability."""
        mean = self.loss / self.predicted
        return math.exp(mean) if mean < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, for JSON."""
        return {"perplexity": self.value, **dataclasses.asdict(self)}

    def line(self) -> str:
        """The result for people."""
        return f"perplexity {self.value:.4f} over {self.predicted} tokens, in windows of {self.window}"


Logits = Callable[[Sequence[int]], torch.Tensor]
"""Maps T tokens of a window to logits [T, V], the ones after each token, or [T - 1, V] without the last token's."""


def measure(tokens: Sequence[int], window: int, logits: Logits) -> Perplexity:
    """Measures a text with any model.

    Args:
        tokens: the text, at least 2 tokens.
        window: most tokens of a window, at least 2.
        logits: the model.

    Raises:
        UsageError: the text or the window has less than 2 tokens.
        ProgramError: the logits hold a NaN.
    """
    if len(tokens) < 2 or window < 2:
        raise UsageError(f"perplexity needs 2 tokens, the text has {len(tokens)} and a window {window}")
    loss, predicted = 0.0, 0
    for start in range(0, len(tokens), window):
        part = list(tokens[start : start + window])
        if len(part) < 2:
            break  # a single last token is predicted from nothing
        rows = logits(part)[: len(part) - 1]
        wanted = torch.tensor(part[1:], device=rows.device)
        # In pieces, because V may be large.
        for some, targets in zip(rows.split(256), wanted.split(256), strict=True):
            loss += float(torch.nn.functional.cross_entropy(some.double(), targets, reduction="sum"))
        predicted += len(part) - 1
        if math.isnan(loss):
            raise ProgramError(f"the logits of tokens {start}..{start + len(part) - 1} hold a NaN")
    return Perplexity(loss, predicted, len(tokens), window)


def program_window(model: LanguageModel, wanted: int | None) -> int:
    """The window for a program: ``wanted``, or the default, or what its caches hold if that is less.

    Raises:
        UsageError: ``wanted`` is more than the caches hold.
    """
    size = model.limits.verify or 1
    most = model.limits.max_seq_len // size * size
    if wanted is not None and wanted > most:
        raise UsageError(f"a window of {wanted} tokens does not fit: the caches hold {most}")
    return min(DEFAULT_WINDOW, most) if wanted is None else wanted


def program_logits(model: LanguageModel) -> Logits:
    """The logits of a program: by ``target_verify``, which returns those of all its tokens, or else by ``decode``.

    ``prefill`` returns the logits of the last token alone.

    Raises:
        ProgramError: the program has neither method.
    """
    size = model.limits.verify
    if size is None and not model.limits.decode:
        raise ProgramError("perplexity needs the method target_verify or decode; export one of them")

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        model.reset()
        if size is None:
            return torch.cat([model.decode(token)[0] for token in tokens[:-1]])
        # Tokens after the last one change no logits before them.
        fed = [*tokens, *[tokens[-1]] * (-len(tokens) % size)]
        calls = [model.call(TARGET_VERIFY, fed[at : at + size])[0] for at in range(0, len(fed), size)]
        return torch.cat(calls)[: len(tokens)]

    return logits
