"""The loop of speculative decoding over three methods of one program.

Notation: the sequence so far has n tokens. The last one, the anchor, has no keys in the target's cache yet. One round:

1. ``draft_decode`` takes the features of the positions that the target's last forward accepted, each with the token
   after it, and returns a first proposal. Each further proposal takes one more call, fed with the draft's own output.
2. ``target_verify`` takes the anchor and the proposals. Row i gives the logits and the feature after i proposals.
3. The accepted proposals and the target's next token are appended; that token is the new anchor.

So the target never runs a plain decode: the features of accepted tokens come from ``target_verify``.

The target's state decides how it goes back after a rejection (:class:`~flashpte.export.state.rollback.Rollback`). KV
caches go back by a smaller position in the next call: keys of rejected tokens stay in the caches, but no row sees them
before they are overwritten. A state that goes back by snapshots is restored to the start of the round, and the next
``target_verify`` feeds the accepted tokens again first, with fewer proposals after them.

Calls have a fixed or minimum length. If the state can take a token again at its own position, a last chunk that would
be too short starts earlier, and so does a ``target_verify`` that would end past the caches. If it cannot, the text ends
when no whole ``target_verify`` fits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence

import torch

from flashpte.export.common.chunks import chunk_bounds
from flashpte.export.common.errors import UsageError
from flashpte.export.common.options import DRAFT_DECODE, PREFILL, TARGET_VERIFY
from flashpte.export.speculative.acceptance import Acceptance
from flashpte.export.speculative.choose import Choose, greedy
from flashpte.export.speculative.generation import Generation, Stop
from flashpte.export.speculative.sizes import SpeculativeProgram
from flashpte.export.state.rollback import Rollback

Run = Callable[..., Sequence[torch.Tensor]]
"""``run(method, *tensors)`` runs a method of the program and returns its results; caches persist between calls.

Tokens and positions are passed on the CPU, features as they were returned. A result must stay valid until the same
method runs again; the loop keeps nothing longer.
"""

Revise = Callable[[Sequence[int], list[int]], list[int]]
"""(the sequence so far, the draft's proposals) -> the proposals to verify instead, not more of them."""


def generate(
    run: Run,
    program: SpeculativeProgram,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    choose: Choose = greedy,
    stop_tokens: Collection[int] = (),
    chain: int | None = None,
    forced_acceptance: int | None = None,
    revise: Revise | None = None,
    on_tokens: Callable[[list[int]], None] | None = None,
    rollback: Rollback | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Continues a prompt by speculative decoding.

    Args:
        run: runs a method of the program.
        program: the program's sizes.
        prompt: token ids, at least one; they start at position 0.
        max_new_tokens: most tokens to generate, at least 1.
        choose: decides which proposals are accepted: :func:`~flashpte.export.speculative.choose.greedy` or a
            ``Sampler``.
        stop_tokens: generation ends after one of these.
        chain: propose at most this many tokens per round; 0 decodes one token per round through ``target_verify`` and
            never calls the draft. ``None`` for the chain that the program was exported with.
        forced_acceptance: accept this many proposals in every round, regardless of the target. This is only for timing:
            the tokens are not those of the target.
        revise: replaces proposals before they are verified.
        on_tokens: called with the new tokens of each round.
        rollback: moves the target's state back; ``None`` for a state that goes back by a smaller position.
        clock: returns the time in seconds, for the times in the result.

    Raises:
        UsageError: the prompt is empty, too long or of a length that no calls add up to, ``revise`` returned too many
            proposals, or a number is out of range.
    """
    loop = _Loop(run, program, program.chain_len if chain is None else chain, rollback or Rollback())
    check_request(program, prompt, max_new_tokens, loop.chain, forced_acceptance)
    loop.tokens = list(prompt)
    first = len(prompt)
    tell = on_tokens or (lambda new: None)
    stopped: Stop | None = None
    start = clock()
    times: list[tuple[int, float]] = []  # numbers of tokens, and the times when they were ready

    def append(new: list[int]) -> None:
        nonlocal stopped
        new = new[: first + max_new_tokens - len(loop.tokens)]
        end = next((index for index, token in enumerate(new) if token in stop_tokens), None)
        if end is not None:
            new, stopped = new[: end + 1], Stop.STOP_TOKEN
        loop.tokens += new
        times.append((len(new), clock()))
        tell(new)
        if stopped is None and len(loop.tokens) == first + max_new_tokens:
            stopped = Stop.LENGTH
        elif stopped is None and (len(loop.tokens) > program.max_seq_len or not loop.fits):
            stopped = Stop.CACHE_FULL

    if len(prompt) >= program.min_prefill_chunk:
        append([choose(loop.prefill(), [])[1]])
    while stopped is None:
        proposals = loop.propose(first + max_new_tokens - len(loop.tokens) - 1)
        if revise is not None:
            offered = len(proposals)
            proposals = revise(loop.tokens, proposals)
            if len(proposals) > offered:
                raise UsageError(f"revise returned {len(proposals)} proposals, the draft made {offered}")
        logits = loop.verify(proposals)
        if forced_acceptance is None:
            accepted, following = choose(logits, proposals)
        else:
            accepted = min(forced_acceptance, len(proposals))
            following = choose(logits[accepted : accepted + 1], [])[1]
        loop.accept(accepted)
        loop.acceptance.record(len(proposals), accepted)
        append([*proposals[:accepted], following])
    first_token_s = times[0][1] - start
    return Generation(
        tokens=tuple(loop.tokens[first:]),
        stopped=stopped,
        prefill_s=first_token_s,
        first_token_s=first_token_s,
        steps=tuple((count, at - before) for (_, before), (count, at) in itertools.pairwise(times)),
        acceptance=loop.acceptance,
        forced=forced_acceptance,
    )


class _Loop:
    """The state between calls.

    Attributes:
        tokens: the prompt and the generated tokens.
        fed: number of tokens with known features.
        held: number of tokens in the target's state; less than ``fed`` after a snapshot was restored.
        features: features [1, T, C] that the draft has not read yet, each with its first position.
    """

    def __init__(self, run: Run, program: SpeculativeProgram, chain: int, rollback: Rollback):
        self.run = run
        self.rollback = rollback
        self.program = program
        self.chain = chain
        self.tokens: list[int] = []
        self.fed = self.held = 0
        self.features: list[tuple[int, torch.Tensor]] = []
        self.acceptance = Acceptance(chain)
        self._verified: tuple[int, torch.Tensor] = (0, torch.empty(0))

    def prefill(self) -> torch.Tensor:
        """Feeds the prompt to the target, and all but its last chunk to the draft; returns the last logits [1, V]."""
        length = len(self.tokens)
        logits = torch.empty(0)
        least, most = self.program.min_prefill_chunk, self.program.max_prefill_chunk
        bounds = chunk_bounds(length, least, most, fed_twice=self.rollback.fed_twice)
        if bounds is None:
            raise UsageError(f"the prompt has {length} tokens, which no prefills of {least}..{most} tokens add up to")
        for start, end in bounds:
            logits, features = self.run(PREFILL, _row(self.tokens[start:end]), torch.arange(start, end))
            if end < length and self.chain:  # the token after the chunk is known: feed its features now
                self._feed_draft(start, features)
            elif self.chain:
                self.features.append((start, features))
        self.fed = self.held = length
        return logits[0, -1:]

    @property
    def fits(self) -> bool:
        """Whether another ``target_verify`` fits in the caches."""
        return self.rollback.fed_twice or self.held + self.program.verify_window <= self.program.max_seq_len

    def propose(self, wanted: int) -> list[int]:
        """Proposes tokens that follow the sequence: at most ``wanted``, limited by chain, window and caches."""
        length = len(self.tokens)
        unfed = length - self.held
        room = min(self.program.max_seq_len - length, self.program.verify_window - unfed)
        count = min(self.chain, wanted, room)
        if count <= 0 or not self.features:
            return []
        proposal = feature = torch.empty(0)
        for start, features in self.features:
            proposal, feature = self._feed_draft(start, features)
        self.features = []
        proposals = [int(proposal)]
        while len(proposals) < count:
            # this is the feature's position, one before the token's
            proposal, feature = self._draft(proposals[-1:], feature, length - 2 + len(proposals))
            proposals.append(int(proposal))
        return proposals

    def _feed_draft(self, start: int, features: torch.Tensor) -> Sequence[torch.Tensor]:
        """Feeds features from position ``start`` on, each with the token after it; returns the last call's results."""
        most = self.program.max_draft_tokens
        result: Sequence[torch.Tensor] = ()
        for offset in range(0, features.shape[1], most):
            part, begin = features[:, offset : offset + most], start + offset
            result = self._draft(self.tokens[begin + 1 : begin + 1 + part.shape[1]], part, begin)
        return result

    def _draft(self, tokens: Sequence[int], features: torch.Tensor, start: int) -> Sequence[torch.Tensor]:
        return self.run(DRAFT_DECODE, _row(tokens), features, torch.arange(start, start + len(tokens)))

    def verify(self, proposals: Sequence[int]) -> torch.Tensor:
        """Feeds the anchor and the proposals; returns logits [R, V], where R is the number of proposals plus 1."""
        window = self.program.verify_window
        start = min(self.held, self.program.max_seq_len - window) if self.rollback.fed_twice else self.held
        row = [*self.tokens[start:], *proposals]
        anchor = len(self.tokens) - 1 - start
        row += [row[-1]] * (window - len(row))  # padding: its keys are overwritten before a row sees them
        self.rollback.keep(start)
        logits, features = self.run(TARGET_VERIFY, _row(row), torch.arange(start, start + window))
        self._verified = (start, features)
        return logits[0, anchor : anchor + len(proposals) + 1]

    def accept(self, accepted: int) -> None:
        """Keeps the features of newly fed tokens and accepted proposals, and moves the state back if needed."""
        start, features = self._verified
        end = len(self.tokens) + accepted
        if self.chain:  # without proposals nothing reads them
            self.features.append((self.fed, features[:, self.fed - start : end - start]))
        self.fed = end
        # either the whole call is part of the sequence, or the rest of it must be undone
        self.held = end if end == start + self.program.verify_window else self.rollback.go_back(end)


def _row(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64)


def check_request(
    program: SpeculativeProgram, prompt: Sequence[int], max_new_tokens: int, chain: int, forced: int | None
) -> None:
    """Checks arguments of :func:`generate`; runs nothing.

    Raises:
        UsageError: the prompt is empty, too long or of a length that no method takes, or a number is out of range.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    if len(prompt) > program.max_seq_len:
        raise UsageError(f"the prompt has {len(prompt)} tokens, the program holds {program.max_seq_len}")
    if program.verify_window < len(prompt) < program.min_prefill_chunk:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens; one prefill takes at least {program.min_prefill_chunk}, "
            f"target_verify {program.verify_window}"
        )
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if not 0 <= chain <= program.chain_len:
        raise UsageError(f"chain {chain}: the program was exported for 0..{program.chain_len}")
    if forced is not None and not 0 <= forced <= chain:
        raise UsageError(f"forced_acceptance {forced}: must be 0..{chain}")
