"""The part of ``run-model`` that generates text, with a draft where the program has one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from flashpte.export.cli.endings import EXIT_OK
from flashpte.export.cli.progress import StageLog
from flashpte.export.cli.run_model_flags import RunOptions
from flashpte.export.common.errors import ExportError, UsageError

if TYPE_CHECKING:
    from flashpte.export.runtime.language_model import RunsMethods
    from flashpte.export.runtime.text import StreamingText

Opened = Callable[[], "tuple[RunsMethods, float]"]
"""Loads the program; returns it and the load time in seconds."""


class _Output:
    """Collects new tokens, as text where there is a tokenizer, and prints them as they arrive unless ``silent``."""

    def __init__(self, text: StreamingText | None, out: TextIO, *, silent: bool):
        self.pieces: list[str] = []
        self._text, self._out, self._silent = text, out, silent

    def show(self, token: int) -> None:
        if self._text is not None:
            self._print(self._text.add(token))
        else:
            self._print(("" if not self.pieces else " ") + str(token))

    def finish(self) -> None:
        if self._text is not None:
            self._print(self._text.finish())

    @property
    def text(self) -> str | None:
        return "".join(self.pieces) if self._text is not None else None

    def _print(self, piece: str) -> None:
        self.pieces.append(piece)
        if not self._silent:
            print(piece, end="", file=self._out, flush=True)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A prompt to continue; ``load_s`` is the program's load time in seconds."""

    options: RunOptions
    progress: StageLog
    program: RunsMethods
    prompt: list[int]
    stop: frozenset[int]
    output: _Output
    load_s: float


def generate_text(options: RunOptions, progress: StageLog, out: TextIO, opened: Opened) -> int:
    """Continues the prompt and prints text and statistics, or one JSON document.

    Raises:
        UsageError, ExportError: the prompt does not fit the program, or the program failed. A full cache ends the
            text; the error is raised after everything was printed.
    """
    from flashpte.export.files.model_folder import read_folder
    from flashpte.export.runtime.generate import check_prompt
    from flashpte.export.runtime.language_model import plan_chunks, read_limits
    from flashpte.export.runtime.speculate import check_speculation, has_draft
    from flashpte.export.runtime.text import StreamingText, encode_prompt, has_tokenizer, open_tokenizer, stop_ids
    from flashpte.export.speculative import Stop

    folder = read_folder(options.model_dir, unverified=options.unverified)
    tokenizer = None
    if has_tokenizer(folder):
        tokenizer = open_tokenizer(folder, chat=options.chat)
    elif options.prompt is not None:
        raise ExportError(f"{folder.path} has no tokenizer: give --prompt-ids, or export a checkpoint that has one")
    if options.prompt_ids is not None:
        prompt = list(options.prompt_ids)
    else:
        prompt = encode_prompt(tokenizer, options.prompt or "", chat=options.chat)
    # check the prompt before reading the weights
    check_prompt(prompt, folder.constants.get("get_vocab_size"))
    drafted = has_draft(folder.signatures)
    if drafted:
        check_speculation(folder.constants, prompt, options.force_accept)
    elif options.force_accept:
        raise UsageError("--force-accept needs a program with a draft (export-model --draft DIR)")
    else:
        plan_chunks(len(prompt), read_limits(folder.signatures, folder.constants))

    program, load_s = opened()
    stop = frozenset() if options.ignore_eos else stop_ids(folder.constants.get("get_eos_ids", ()), tokenizer)
    output = _Output(StreamingText(tokenizer) if tokenizer is not None else None, out, silent=options.json)
    run = _speculate if drafted else _decode
    tokens, stopped, statistics = run(_Job(options, progress, program, prompt, stop, output, load_s))
    if options.json:
        document = {
            "prompt_tokens": prompt,
            "tokens": list(tokens),
            "text": output.text,
            "stopped": stopped,
            "statistics": statistics.to_dict(),
        }
        print(json.dumps(document), file=out)
    else:
        print("\n", *statistics.lines(), sep="\n", file=out)
    if stopped is Stop.CACHE_FULL:
        raise ExportError(
            f"the cache is full: {folder.constants['get_max_seq_len']} positions hold the prompt and {len(tokens) - 1} "
            f"new tokens, {options.max_new_tokens} were asked for; export with a larger --max-seq-len"
        )
    return EXIT_OK


def _decode(job: _Job) -> tuple[tuple[int, ...], str, Any]:
    from flashpte.export.runtime.generate import generate
    from flashpte.export.runtime.language_model import LanguageModel
    from flashpte.export.runtime.statistics import Statistics

    _say_generating(job.options, job.progress)
    result = generate(
        LanguageModel(job.program),
        job.prompt,
        max_new_tokens=job.options.max_new_tokens,
        temperature=job.options.temperature,
        seed=job.options.seed,
        stop=job.stop,
        on_token=job.output.show,
    )
    job.output.finish()
    statistics = Statistics(
        load_s=job.load_s,
        prompt_tokens=len(job.prompt),
        prefill_s=result.prefill_s,
        first_token_s=result.first_token_s,
        decode_s=tuple(seconds for _, seconds in result.steps),
        peak_bytes=_peak_bytes(job.program),
        captured=getattr(job.program, "captured", ()),
    )
    return result.tokens, result.stopped, statistics


def _speculate(job: _Job) -> tuple[tuple[int, ...], str, Any]:
    from flashpte.export.common.options import DECODE
    from flashpte.export.runtime.speculate import SpeculativeStatistics, decode_plainly, speculate

    chosen: dict[str, Any] = {"temperature": job.options.temperature, "seed": job.options.seed}
    count, compares = job.options.max_new_tokens, DECODE in job.program.signatures or job.options.force_accept
    if compares:  # a kernel's first call loads it, which a comparison of rates must not count
        job.progress("warming up")
        speculate(job.program, job.prompt, max_new_tokens=min(8, count), **chosen)
    _say_generating(job.options, job.progress)
    runs = [speculate(job.program, job.prompt, max_new_tokens=count, stop=job.stop, on_token=job.output.show, **chosen)]
    job.output.finish()
    if DECODE in job.program.signatures:
        job.progress("decoding plainly")
        decode_plainly(job.program, job.prompt, max_new_tokens=min(8, count), **chosen)
        runs.append(decode_plainly(job.program, job.prompt, max_new_tokens=count, stop=job.stop, **chosen))
    for accepted in job.options.force_accept:
        job.progress(f"accepting {accepted} of every round")
        runs.append(speculate(job.program, job.prompt, max_new_tokens=count, forced=accepted, **chosen))
    statistics = SpeculativeStatistics(
        load_s=job.load_s,
        prompt_tokens=len(job.prompt),
        runs=tuple(runs),
        sampled=job.options.temperature > 0,
        peak_bytes=_peak_bytes(job.program),
        captured=getattr(job.program, "captured", ()),
    )
    return runs[0].tokens, runs[0].stopped, statistics


def _say_generating(options: RunOptions, progress: StageLog) -> None:
    progress("generating")
    if not options.json:
        progress.stop()  # text and a spinner cannot share a terminal


def _peak_bytes(program: RunsMethods) -> int | None:
    import torch

    device = getattr(program, "device", None)
    return torch.cuda.max_memory_allocated(device) if device is not None and device.type == "cuda" else None
