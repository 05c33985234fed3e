"""Generates text with a program and its draft, and times it against plain decoding and forced acceptance."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from flashpte.export.common.errors import Option, ProgramError, UsageError
from flashpte.export.common.options import DECODE, DRAFT_DECODE, PREFILL, TARGET_VERIFY
from flashpte.export.common.tables import table_lines
from flashpte.export.files.signature import MethodSignature
from flashpte.export.runtime import generate as plain
from flashpte.export.runtime.language_model import CacheFullError, LanguageModel, RunsMethods
from flashpte.export.speculative import Choose, Generation, Sampler, SpeculativeProgram, generate, greedy
from flashpte.export.speculative.loop import check_request
from flashpte.export.state.layer_state import DRAFT_PART, TARGET_PART
from flashpte.export.state.rollback import Rollback


def has_draft(signatures: Mapping[str, MethodSignature]) -> bool:
    """Whether a program has the three methods that speculative decoding needs."""
    return {PREFILL, TARGET_VERIFY, DRAFT_DECODE} <= signatures.keys()


def check_speculation(constants: Mapping[str, Any], prompt: Sequence[int], forced: Sequence[int] = ()) -> None:
    """Checks a prompt and forced acceptances against a program's sizes, before the program is loaded.

    Raises:
        CacheFullError: the prompt is longer than the caches.
        UsageError: no method takes a prompt of this length, or a forced acceptance exceeds the chain.
        ExportError: the program lacks a constant method with one of its sizes.
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
) -> Generation:
    """Continues a prompt from position 0 by speculative decoding with the program's draft.

    Args:
        program: a program with a draft; its caches may hold anything.
        prompt: token ids.
        max_new_tokens: most new tokens, at least 1.
        temperature: 0 takes the target's most likely token each time.
        seed: seed of sampling at a temperature above 0.
        stop: tokens that end the text.
        forced: accept exactly this many proposals in every round; the result is then not a meaningful text.
        chain: propose at most this many tokens per round, 0 for none; ``None`` for the program's own chain.
        on_token: called with each new token that is not a stop token.
        clock: returns the time in seconds, for the times in the result.

    Raises:
        UsageError: the prompt is empty or does not fit, or a number is out of range.
        ProgramError: the program failed, its largest logit is a NaN or an infinity, or the draft's state goes back by
            snapshots.
    """

    def told(new: list[int]) -> None:
        if on_token is not None:
            for token in new:
                if token not in stop:
                    on_token(token)

    def run(method: str, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        results = program.run(method, *inputs)
        program.synchronize()  # the host reads every result next; report a device error at this call
        return results

    plain.check_prompt(prompt, program.constants.get("get_vocab_size"))
    return generate(
        run,
        SpeculativeProgram.from_constants(program.constants),
        prompt,
        max_new_tokens,
        choose=_choice(temperature, seed, getattr(program, "device", torch.device("cpu"))),
        stop_tokens=stop,
        chain=chain,
        forced_acceptance=forced,
        on_tokens=told,
        rollback=_rollback(program),
        clock=clock,
    )


def _rollback(program: RunsMethods) -> Rollback:
    states = program.states
    if Rollback((rules for rules in states if rules.part == DRAFT_PART), program.buffers).needed:
        raise ProgramError("the draft's state goes back by snapshots, but the loop takes them only of the target's")
    return Rollback((rules for rules in states if rules.part == TARGET_PART), program.buffers)


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
) -> Generation:
    """Continues a prompt without the draft, with the method ``decode``; see :func:`speculate` for the arguments.

    Raises:
        UsageError: see :func:`speculate`.
        ProgramError: the program has no method ``decode``, or failed.
    """
    if DECODE not in program.signatures:
        raise ProgramError("the program has no method decode")
    program.reset()
    return plain.generate(
        LanguageModel(program),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop,
        clock=clock,
    )


def _described(run: Generation) -> dict[str, Any]:
    """A run as plain data, without its tokens."""
    found: dict[str, Any] = {"tokens": len(run.tokens), "tokens_per_s": run.tokens_per_s}
    if run.acceptance is not None:
        found |= {
            "forced_acceptance": run.forced,
            "rounds": run.acceptance.rounds,
            "mean_accepted_length": run.acceptance.mean_accepted_length,
            "acceptance_per_position": run.acceptance.per_position,
        }
    return found


@dataclasses.dataclass(frozen=True)
class SpeculativeStatistics:
    """Times and acceptance of a run with a draft.

    Attributes:
        load_s: time to open the folder and load the program, in seconds.
        prompt_tokens: number of tokens in the prompt.
        runs: the measured run, then the runs to compare it with.
        sampled: whether tokens were sampled, so that runs may have different tokens.
        peak_bytes: peak GPU memory that PyTorch allocated, in bytes; ``None`` without a GPU.
        captured: methods that ran as CUDA graphs.
    """

    load_s: float
    prompt_tokens: int
    runs: tuple[Generation, ...]
    sampled: bool = False
    peak_bytes: int | None = None
    captured: tuple[str, ...] = ()

    @property
    def first_difference(self) -> int | None:
        """Index of the first token where plain decoding differs; -1 if none, ``None`` if not run or if sampled."""
        decoded = next((run for run in self.runs if run.acceptance is None), None)
        if decoded is None or self.sampled:
            return None
        pairs = zip(self.runs[0].tokens, decoded.tokens, strict=False)
        return next((index for index, (a, b) in enumerate(pairs) if a != b), -1)

    def to_dict(self) -> dict[str, Any]:
        """The statistics as plain data, for JSON; rates in tokens per second, times in seconds."""
        first = self.runs[0]
        return {
            "load_s": self.load_s,
            "time_to_first_token_s": first.first_token_s,
            "prompt_tokens": self.prompt_tokens,
            **_described(first),
            "compared": {run.name: _described(run) for run in self.runs[1:]},
            "first_difference_from_plain_decode": self.first_difference,
            "peak_gpu_bytes": self.peak_bytes,
            "cuda_graphs": list(self.captured),
        }

    def lines(self) -> list[str]:
        """The statistics for people: a table of the runs and one line for each other number."""
        table = [("", "tokens", "tokens/s", "tokens/round", "accepted at position 1, 2, ...")]
        for run in self.runs:
            rate, length, shares = run.tokens_per_s, "", ""
            if run.acceptance is not None:
                length = f"{run.acceptance.mean_accepted_length:.2f}"
                shares = " ".join("-" if share is None else f"{share:.2f}" for share in run.acceptance.per_position)
            table.append((run.name, str(len(run.tokens)), "-" if rate is None else f"{rate:.1f}", length, shares))
        lines = table_lines(table, ragged=True)
        if self.first_difference is not None:
            where = "nowhere" if self.first_difference < 0 else f"first at new token {self.first_difference + 1}"
            lines.append(f"plain decode chose another token: {where}")
        lines.append(f"load {self.load_s:.2f} s, time to first token {1e3 * self.runs[0].first_token_s:.1f} ms")
        if self.peak_bytes is not None:
            lines.append(f"peak GPU memory {self.peak_bytes / 2**20:.1f} MiB")
        lines.append(f"CUDA graphs: {', '.join(self.captured) or 'none'}")
        return lines
