"""Generates text with a program: chunked prefill, then one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import torch

from flashpte.export.common.errors import ProgramError, UsageError
from flashpte.export.runtime.language_model import CacheFullError, LanguageModel
from flashpte.export.speculative import Generation, Stop


def check_prompt(prompt: Sequence[int], vocabulary: int | None) -> None:
    """Checks that a prompt holds only ids in the vocabulary; an embedding would read past its end for other ids.

    Raises:
        UsageError: the prompt is empty, or an id is not in the vocabulary.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    for token in prompt:
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            bound = "" if vocabulary is None else f"..{vocabulary - 1}"
            raise UsageError(f"prompt token {token} is not in the vocabulary (0{bound})")


def sample(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """Chooses a token from logits [1, 1, V]: the largest at temperature 0, else drawn by softmax(logits / temperature).

    Raises:
        ProgramError: the largest logit is a NaN or an infinity.
    """
    row = logits.reshape(-1).float()
    largest, index = row.max(0)
    value, choice = torch.stack([largest.double(), index.double()]).tolist()  # one transfer
    if value != value or value in (float("inf"), float("-inf")):
        raise ProgramError(f"the logits hold {value}: the program computed no distribution")
    if temperature == 0.0:
        return int(choice)
    weights = torch.softmax((row - largest) / temperature, 0)
    return int(torch.multinomial(weights, 1, generator=generator).item())


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Continues a prompt from the model's current position.

    Args:
        model: the model; its cache must have room for the prompt.
        prompt: token ids.
        max_new_tokens: most new tokens, at least 1.
        temperature: 0 takes the most likely token each time.
        seed: seed of sampling at a temperature above 0.
        stop: tokens that end the text.
        on_token: called with each new token that is not a stop token.
        clock: returns the time in seconds, for the times in the result.

    Raises:
        UsageError: the prompt is empty or holds an id outside the vocabulary, or ``max_new_tokens`` is less than 1.
        CacheFullError: the prompt does not fit in the cache. A cache that fills up later ends the text (``stopped`` in
            the result says so): a token without a slot is never fed.
    """
    check_prompt(prompt, model.program.constants.get("get_vocab_size"))
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    start = clock()
    logits = model.prefill(prompt)
    model.program.synchronize()
    prefill_s = clock() - start
    generator = None
    if temperature > 0:
        generator = torch.Generator(logits.device).manual_seed(seed)
    tokens = [sample(logits, temperature, generator)]
    first_token_s = clock() - start
    steps: list[tuple[int, float]] = []
    stopped = Stop.LENGTH
    last = clock()
    while True:
        if tokens[-1] in stop:
            stopped = Stop.STOP_TOKEN
            break
        if on_token is not None:
            on_token(tokens[-1])
        if len(tokens) >= max_new_tokens:
            break
        try:
            logits = model.decode(tokens[-1])
        except CacheFullError:
            stopped = Stop.CACHE_FULL
            break
        model.program.synchronize()  # report a device error at this call
        tokens.append(sample(logits, temperature, generator))
        now = clock()
        steps.append((1, now - last))
        last = now
    return Generation(tuple(tokens), stopped, prefill_s, first_token_s, tuple(steps))
