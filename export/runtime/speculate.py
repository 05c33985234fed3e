"""Speculative text generation with a program, timed, beside plain decoding and forced acceptance."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from flashpte.export.common.errors import Option, ProgramError, UsageError
from flashpte.export.common.options import DECODE, DRAFT_DECODE, PREFILL, TARGET_VERIFY
from flashpte.export.files.signature import MethodSignature
from flashpte.export.runtime import generate as plain
from flashpte.export.runtime.language_model import CacheFullError, LanguageModel, RunsMethods
from flashpte.export.speculative import Acceptance, Choose, Sampler, SpeculativeProgram, generate, greedy
from flashpte.export.speculative.loop import check_request

_STOPPED = {"stop_token": "stop token", "max_new_tokens": "length", "max_seq_len": "cache full"}


@dataclasses.dataclass(frozen=True)
class Speculation:
    """A generation and what it took; times in seconds.

    Attributes:
        tokens: the new tokens, a final stop token included.
        stopped: ``"stop token"``, ``"length"`` or ``"cache full"``.
        first_token_s: until the first tokens were chosen.
        later: how many tokens came after those.
        later_s: how long they took.
        acceptance: how much of the draft's proposals was accepted; ``None`` for plain decoding.
        forced: how many proposals a round accepted whatever the target said; ``None``: it had its way.
    """

    tokens: tuple[int, ...]
    stopped: str
    first_token_s: float
    later: int
    later_s: float
    acceptance: Acceptance | None = None
    forced: int | None = None

    @property
    def name(self) -> str:
        """For tables."""
        if self.acceptance is None:
            return "plain decode"
        return "speculative" if self.forced is None else f"forced acceptance {self.forced}"

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first tokens; ``None`` if there were no more, or no time passed."""
        return self.later / self.later_s if self.later and self.later_s > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """For machines; without the tokens."""
        found: dict[str, Any] = {"tokens": len(self.tokens), "tokens_per_s": self.tokens_per_s}
        if self.acceptance is not None:
            found |= {
                "forced_acceptance": self.forced,
                "rounds": self.acceptance.rounds,
                "mean_accepted_length": self.acceptance.mean_accepted_length,
                "acceptance_per_position": self.acceptance.per_position,
            }
        return found


def has_draft(signatures: Mapping[str, MethodSignature]) -> bool:
    """Whether a program has the three methods that speculative decoding needs."""
    return {PREFILL, TARGET_VERIFY, DRAFT_DECODE} <= signatures.keys()


def check_speculation(constants: Mapping[str, Any], prompt: Sequence[int], forced: Sequence[int] = ()) -> None:
    """Checks a prompt and forced acceptances against a program's sizes, before it is loaded.

    Raises:
        CacheFullError: the prompt is longer than the caches.
        UsageError: no method takes such a prompt, or a forced acceptance is more than the chain.
        ExportError: the program does not say its sizes.
    """
    sizes = SpeculativeProgram.from_constants(constants)
    if len(prompt) > sizes.max_seq_len:
        raise CacheFullError(f"the prompt has {len(prompt)} tokens, the cache holds {sizes.max_seq_len}")
    for count in forced:
        if count > sizes.chain_len:
            raise UsageError(Option("force_accept", count), f": the draft proposes {sizes.chain_len} tokens a round")
    check_request(sizes, prompt, 1, sizes.chain_len, None)


def speculate(
    program: RunsMethods,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    forced: int | None = None,
    chain: int | None = None,
    on_token: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Speculation:
    """Continues a prompt from position 0, the program's draft proposing.

    Args:
        program: one with a draft; its caches may hold anything.
        prompt: token ids.
        max_new_tokens: at most this many new tokens.
        temperature: 0 for the target's most likely token each time.
        seed: of the choices at a temperature above 0.
        stop: tokens that end the text.
        forced: accept this many proposals in every round; what comes out is no text then.
        chain: propose at most this many tokens a round, 0 for none; ``None`` for the program's own.
        on_token: called with each new token that is no stop token.
        clock: seconds, for the times in the result.

    Raises:
        UsageError: the prompt is empty or does not fit, or a number is out of range.
        ProgramError: the program failed, or its logits hold a NaN or an infinity.
    """
    batches: list[tuple[int, float]] = []

    def told(new: list[int]) -> None:
        batches.append((len(new), clock()))
        if on_token is not None:
            for token in new:
                if token not in stop:
                    on_token(token)

    def run(method: str, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        results = program.run(method, *inputs)
        program.synchronize()  # every result is read on the host next; an error of the device has a name here
        return results

    plain.check_prompt(prompt, program.constants.get("get_vocab_size"))
    start = clock()
    result = generate(
        run,
        SpeculativeProgram.from_constants(program.constants),
        prompt,
        max_new_tokens,
        choose=_choice(temperature, seed, getattr(program, "device", torch.device("cpu"))),
        stop_tokens=stop,
        chain=chain,
        forced_acceptance=forced,
        on_tokens=told,
    )
    first, at = batches[0]
    return Speculation(
        tokens=tuple(result.tokens),
        stopped=_STOPPED[result.stopped],
        first_token_s=at - start,
        later=len(result.tokens) - first,
        later_s=batches[-1][1] - at,
        acceptance=result.acceptance,
        forced=forced,
    )


def _choice(temperature: float, seed: int, device: torch.device) -> Choose:
    choose: Choose = greedy
    if temperature > 0:
        choose = Sampler(temperature, generator=torch.Generator(device).manual_seed(seed))

    def checked(logits: torch.Tensor, proposals: Sequence[int]) -> tuple[int, int]:
        largest = float(logits.max())
        if not math.isfinite(largest):
            raise ProgramError(f"the logits hold {largest}: the program computed no distribution")
        return choose(logits, proposals)

    return checked


def decode_plainly(
    program: RunsMethods,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Speculation:
    """The same without the draft, by the method ``decode``; see :func:`speculate`.

    Raises:
        ProgramError: the program has no such method, or failed.
    """
    if DECODE not in program.signatures:
        raise ProgramError("the program has no method decode")
    program.reset()
    found = plain.generate(
        LanguageModel(program),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop,
        clock=clock,
    )
    return Speculation(found.tokens, found.stopped, found.first_token_s, len(found.decode_s), sum(found.decode_s))


@dataclasses.dataclass(frozen=True)
class SpeculativeStatistics:
    """What a run with a draft took.

    Attributes:
        load_s: from opening the folder until the program could run, seconds.
        prompt_tokens: tokens of the prompt.
        runs: the measured one first, then those to compare it with.
        sampled: whether tokens were drawn, so that runs need not have the same ones.
        peak_bytes: most GPU memory that PyTorch had allocated; ``None`` without a GPU.
        captured: methods that ran as a CUDA graph.
    """

    load_s: float
    prompt_tokens: int
    runs: tuple[Speculation, ...]
    sampled: bool = False
    peak_bytes: int | None = None
    captured: tuple[str, ...] = ()

    @property
    def first_difference(self) -> int | None:
        """Where plain decoding chose another token: -1 nowhere; ``None`` without a run of it, or with sampling."""
        decoded = next((run for run in self.runs if run.acceptance is None), None)
        if decoded is None or self.sampled:
            return None
        pairs = zip(self.runs[0].tokens, decoded.tokens, strict=False)
        return next((index for index, (a, b) in enumerate(pairs) if a != b), -1)

    def to_dict(self) -> dict[str, Any]:
        """For machines; rates in tokens per second, times in seconds."""
        first = self.runs[0]
        return {
            "load_s": self.load_s,
            "time_to_first_token_s": first.first_token_s,
            "prompt_tokens": self.prompt_tokens,
            **first.to_dict(),
            "compared": {run.name: run.to_dict() for run in self.runs[1:]},
            "first_difference_from_plain_decode": self.first_difference,
            "peak_gpu_bytes": self.peak_bytes,
            "cuda_graphs": list(self.captured),
        }

    def lines(self) -> list[str]:
        """For people: a table of the runs, and one line for each other part."""
        table = [("", "tokens", "tokens/s", "tokens/round", "accepted at position 1, 2, ...")]
        for run in self.runs:
            rate, length, shares = run.tokens_per_s, "", ""
            if run.acceptance is not None:
                length = f"{run.acceptance.mean_accepted_length:.2f}"
                shares = " ".join("-" if share is None else f"{share:.2f}" for share in run.acceptance.per_position)
            table.append((run.name, str(len(run.tokens)), "-" if rate is None else f"{rate:.1f}", length, shares))
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 4)), row[4]]).rstrip()
            for row in table
        ]
        if self.first_difference is not None:
            where = "nowhere" if self.first_difference < 0 else f"first at new token {self.first_difference + 1}"
            lines.append(f"plain decode chose another token: {where}")
        lines.append(f"load {self.load_s:.2f} s, time to first token {1e3 * self.runs[0].first_token_s:.1f} ms")
        if self.peak_bytes is not None:
            lines.append(f"peak GPU memory {self.peak_bytes / 2**20:.1f} MiB")
        lines.append(f"CUDA graphs: {', '.join(self.captured) or 'none'}")
        return lines
