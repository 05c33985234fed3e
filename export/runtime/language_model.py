"""Drives a program as a language model: chunked prefill, decode and verify at a current position."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from flashpte.export.common.chunks import chunk_bounds
from flashpte.export.common.errors import ProgramError, UsageError
from flashpte.export.common.options import DECODE, PREFILL, TARGET_METHODS, TARGET_VERIFY, TEMPERATURE
from flashpte.export.files.signature import MethodSignature
from flashpte.export.state.layer_state import TARGET_PART, StateRules
from flashpte.export.state.rollback import Rollback


class RunsMethods(Protocol):
    """The interface of :class:`~flashpte.export.runtime.program.Program` used here; other runners can implement it."""

    signatures: dict[str, MethodSignature]
    constants: Mapping[str, Any]
    buffers: dict[str, torch.Tensor]
    states: tuple[StateRules, ...]

    def run(self, method: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Runs a method and returns its outputs."""

    def reset(self) -> None:
        """Restores the initial values of the buffers."""

    def synchronize(self) -> None:
        """Waits for the device."""


class CacheFullError(ProgramError):
    """A call would write past the last slot of the KV cache."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The lengths that a program's methods take.

    Attributes:
        max_seq_len: positions that the caches hold.
        prefill: fewest and most tokens of one prefill call; ``None`` without that method.
        decode: whether there is a decode method.
        verify: tokens of one target_verify call; ``None`` without that method.
    """

    max_seq_len: int
    prefill: tuple[int, int] | None
    decode: bool
    verify: int | None


def read_limits(signatures: Mapping[str, MethodSignature], constants: Mapping[str, Any]) -> Limits:
    """Reads the limits from the methods' shapes and the constant methods; the tighter one counts.

    Raises:
        ProgramError: the program is not a language model that ``export-model`` wrote.
    """
    known = [name for name in TARGET_METHODS if name in signatures]
    if not known:
        raise ProgramError(f"not a language model: it has the methods {', '.join(signatures)}, none of prefill, decode")
    for name in known:
        ranks = [len(spec.shape) for spec in signatures[name].inputs]
        if [spec.name for spec in signatures[name].inputs][2:] == [TEMPERATURE]:
            raise ProgramError(
                f"{name} takes a temperature and returns a sampled token: this file is for ExecuTorch's own runner; "
                "only an export without a runner returns logits"
            )
        if ranks != [2, 1] or any(spec.dtype != torch.int64 for spec in signatures[name].inputs):
            inputs = ", ".join(map(str, signatures[name].inputs))
            raise ProgramError(
                f"{name} takes {inputs}; a language model's takes tokens [1, T] and input_pos [T], int64"
            )
    length = constants.get("get_max_seq_len")
    if not isinstance(length, int) or length < 1:
        raise ProgramError("the program does not say how many positions its caches hold (get_max_seq_len)")
    prefill = None
    if PREFILL in signatures:
        low, high = _tokens(signatures[PREFILL])
        low = max(low, constants.get("get_min_prefill_chunk", low))
        high = min(length if high is None else high, constants.get("get_max_prefill_chunk", length), length)
        if low > high:
            raise ProgramError(f"prefill admits no length: at least {low} and at most {high} tokens")
        prefill = (low, high)
    verify = _tokens(signatures[TARGET_VERIFY])[0] if TARGET_VERIFY in signatures else None
    return Limits(length, prefill, DECODE in signatures, verify)


def _tokens(signature: MethodSignature) -> tuple[int, int | None]:
    size = signature.inputs[0].shape[1]
    return (size, size) if isinstance(size, int) else size


def plan_chunks(count: int, limits: Limits) -> list[tuple[str, int]]:
    """Divides a prompt of ``count`` tokens into calls ``(method, tokens)``.

    Each prefill takes as many tokens as it may. If the last chunk would be too short for prefill, the chunk before it
    gives up tokens. A prompt too short for prefill is decoded, and so is any prompt without a prefill method.

    Raises:
        UsageError: ``count`` is less than 1.
        CacheFullError: the prompt does not fit in the cache.
        ProgramError: the program has no method for a prompt of this length.
    """
    if count < 1:
        raise UsageError("the prompt is empty")
    if count > limits.max_seq_len:
        raise CacheFullError(f"the prompt has {count} tokens, the cache holds {limits.max_seq_len}")
    bounds = chunk_bounds(count, *limits.prefill) if limits.prefill is not None else None
    if bounds is not None:
        return [(PREFILL, end - start) for start, end in bounds]
    if not limits.decode:
        low, high = limits.prefill or (0, 0)
        raise ProgramError(f"no method takes a prompt of {count} tokens: prefill takes {low}..{high}; no decode")
    return [(DECODE, 1)] * count


class LanguageModel:
    """A sequence in a program's caches; calls write tokens at :attr:`position` and advance it.

    Attributes:
        program: runs the methods.
        limits: the lengths that they take.
        position: position of the next token.
        features: features [1, T, C] from the last call, in a program with a draft; else ``None``.
    """

    def __init__(self, program: RunsMethods):
        self.program = program
        self.limits = read_limits(program.signatures, program.constants)
        self.position = 0
        self.features: torch.Tensor | None = None
        self._rollback = Rollback((rules for rules in program.states if rules.part == TARGET_PART), program.buffers)
        self._fed: list[int] = []  # the token at each position
        self._furthest = 0  # one past the last position ever fed

    def call(self, method: str, tokens: Sequence[int]) -> torch.Tensor:
        """Runs a method on tokens at the current position.

        Returns:
            The method's logits, [1, 1, V] or for ``target_verify`` [1, M, V], on the program's device.

        Raises:
            CacheFullError: the tokens would go past the last slot; nothing is run.
        """
        end = self.position + len(tokens)
        if end > self.limits.max_seq_len:
            raise CacheFullError(
                f"the cache is full: it holds {self.limits.max_seq_len} positions, {method} would write up to {end}"
            )
        self._rollback.keep(self.position)
        self._fed[self.position :] = tokens
        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        logits, *others = self.program.run(method, ids, torch.arange(self.position, end, dtype=torch.int64))
        self.features = others[0] if others else None
        self.position = end
        self._furthest = max(self._furthest, end)
        return logits

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feeds a prompt in chunks; returns the last token's logits [1, 1, V].

        Raises:
            CacheFullError: the prompt does not fit in the rest of the cache; nothing is run.
        """
        if self.position + len(tokens) > self.limits.max_seq_len:
            raise CacheFullError(
                f"the prompt has {len(tokens)} tokens, the cache has {self.limits.max_seq_len - self.position} "
                f"of its {self.limits.max_seq_len} positions left"
            )
        done, logits = 0, None
        for method, size in plan_chunks(len(tokens), self.limits):
            logits = self.call(method, tokens[done : done + size])
            done += size
        assert logits is not None
        return logits

    def decode(self, token: int) -> torch.Tensor:
        """Feeds one token; returns its logits [1, 1, V].

        Raises:
            CacheFullError: there is no slot left.
            ProgramError: the program has no decode method.
        """
        if not self.limits.decode:
            raise ProgramError("the program has no method decode")
        return self.call(DECODE, [token])

    def reset(self) -> None:
        """Starts a new sequence."""
        self.program.reset()
        self._rollback.forget()
        self._fed.clear()
        self.position = self._furthest = 0

    def move_back(self, position: int) -> None:
        """Goes back to an earlier position, as after rejected drafts; the next calls overwrite later tokens.

        If a state goes back by snapshots, this restores one and feeds the tokens after it again.

        Raises:
            UsageError: ``position`` is negative or after the current one, or a state cannot go back that far.
            ProgramError: no method takes the tokens that must be fed again.
        """
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot go to position {position} from {self.position}")
        if position == self.position:
            return
        most = self._rollback.most_back
        if most is not None and 0 < position < self._furthest - most:  # position 0 starts a new sequence
            raise UsageError(
                f"cannot go back to position {position}: {self._furthest} were fed, and a layer goes back by {most} at "
                "most"
            )
        if not self._rollback.needed:
            self.position = position
            self._furthest = self._furthest if position else 0
            return
        again = self._fed[:position]
        for start in (*self._rollback.kept_before(position), 0):
            try:
                calls = plan_chunks(position - start, self.limits) if start < position else []
            except ProgramError:
                continue  # too few tokens for any method: start further back
            if start:
                self.position = self._rollback.go_back(start)
            else:
                self.reset()
            for method, size in calls:
                self.call(method, again[self.position : self.position + size])
            return
        raise ProgramError(f"cannot go back to position {position}: no methods take {position} tokens from the start")
