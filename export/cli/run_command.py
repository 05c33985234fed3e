"""``run-model``: a folder of export-model in, text, a verdict or a profile out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from flashpte.export.cli.endings import EXIT_FAILED, EXIT_OK, quiet_libraries, report_errors, stdout_may_close
from flashpte.export.cli.progress import StageLog
from flashpte.export.cli.run_arguments import RunOptions, build_run_parser, check_run_arguments
from flashpte.export.errors import ExportError
from flashpte.export.signals import raise_on_termination

if TYPE_CHECKING:
    from flashpte.export.runtime.language_model import RunsMethods


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``run-model``.

    Args:
        argv: the arguments after the program's name; ``None`` for those of the process.

    Returns:
        0 when done, 1 after a failure or a check that found something wrong, 2 for wrong options, 130 after Ctrl-C, 128
        and the signal's number after SIGTERM and SIGHUP. Every error is one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in arguments or "--verbose" in arguments

    def run() -> int:
        args = build_run_parser().parse_args(arguments)
        options = check_run_arguments(args)
        out = sys.stdout
        with StageLog(quiet=args.quiet) as progress, quiet_libraries(args.verbose), stdout_may_close(out):
            return _TASKS[options.task](options, progress, out)
        return EXIT_OK  # whoever read the output has gone

    with raise_on_termination():
        return report_errors("run-model", run, verbose=verbose)


def _generate(options: RunOptions, progress: StageLog, out: TextIO) -> int:
    from flashpte.export.runtime.folder import read_folder
    from flashpte.export.runtime.generate import check_prompt, generate
    from flashpte.export.runtime.language_model import LanguageModel, plan_chunks, read_limits
    from flashpte.export.runtime.statistics import Statistics
    from flashpte.export.runtime.text import StreamingText, encode_prompt, has_tokenizer, load_tokenizer, stop_ids

    folder = read_folder(options.model_dir, unverified=options.unverified)
    tokenizer = None
    if has_tokenizer(folder):
        tokenizer = load_tokenizer(folder.path)
    elif options.prompt is not None:
        raise ExportError(f"{folder.path} has no tokenizer: give --prompt-ids, or export a checkpoint that has one")
    if options.prompt_ids is not None:
        prompt = list(options.prompt_ids)
    else:
        prompt = encode_prompt(tokenizer, options.prompt or "", chat=options.chat)
    # before the weights are read: what is wrong with the prompt
    check_prompt(prompt, folder.constants.get("get_vocab_size"))
    plan_chunks(len(prompt), read_limits(folder.signatures, folder.constants))

    program, load_s = _open(options, progress)
    model = LanguageModel(program)
    stop = frozenset() if options.ignore_eos else stop_ids(folder.constants.get("get_eos_ids", ()), tokenizer)
    text = StreamingText(tokenizer) if tokenizer is not None else None
    pieces: list[str] = []

    def show(token: int) -> None:
        piece = text.add(token) if text is not None else ("" if not pieces else " ") + str(token)
        pieces.append(piece)
        if not options.json:
            print(piece, end="", file=out, flush=True)

    progress("generating")
    if not options.json:
        progress.stop()  # text and a spinner cannot share a terminal
    result = generate(
        model,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        stop=stop,
        on_token=show,
    )
    if text is not None:
        pieces.append(text.finish())
        if not options.json:
            print(pieces[-1], end="", file=out)
    statistics = Statistics(
        load_s=load_s,
        prompt_tokens=len(prompt),
        prefill_s=result.prefill_s,
        first_token_s=result.first_token_s,
        decode_s=result.decode_s,
        peak_bytes=_peak_bytes(program),
        captured=getattr(program, "captured", ()),
    )
    if options.json:
        document = {
            "prompt_tokens": prompt,
            "tokens": list(result.tokens),
            "text": "".join(pieces) if text is not None else None,
            "stopped": result.stopped,
            "statistics": statistics.to_dict(),
        }
        print(json.dumps(document), file=out)
    else:
        print("\n", *statistics.lines(), sep="\n", file=out)
    if result.stopped == "cache full":
        raise ExportError(
            f"the cache is full: {model.limits.max_seq_len} positions hold the prompt and {len(result.tokens) - 1} new "
            f"tokens, {options.max_new_tokens} were asked for; export with a larger --max-seq-len"
        )
    return EXIT_OK


def _check(options: RunOptions, progress: StageLog, out: TextIO) -> int:
    from flashpte.export.runtime.check import check_program
    from flashpte.export.runtime.folder import read_folder
    from flashpte.export.runtime.reference import eager_pair, rebuild

    folder = read_folder(options.model_dir, unverified=options.unverified)
    program, _ = _open(options, progress)
    progress("building the eager model")
    model = rebuild(folder.manifest, options.checkpoint)
    own, reference = eager_pair(model)
    report = check_program(
        program,
        own,
        reference,
        dtype=next(model.parameters()).dtype,
        window=folder.manifest["model"].get("sliding_window"),
        weights=getattr(program, "weights", None),
        model_weights=model.state_dict(),
        progress=progress,
    )
    print(json.dumps(report.to_dict()) if options.json else "\n".join(report.lines()), file=out)
    return EXIT_OK if report.passed else EXIT_FAILED


def _profile(options: RunOptions, progress: StageLog, out: TextIO) -> int:
    from flashpte.export.runtime.plot import draw, require_matplotlib
    from flashpte.export.runtime.profile import plan_profile, profile_program

    if options.plot is not None:
        require_matplotlib()
    program, _ = _open(options, progress)
    plan = plan_profile(program, options.contexts, options.prefill)
    report = profile_program(program, plan, progress=progress)
    if options.plot is not None:
        draw(report, options.plot)
    print(json.dumps(report.to_dict()) if options.json else "\n".join(report.lines()), file=out)
    return EXIT_OK


def open_program(options: RunOptions, progress: Callable[[str], None]) -> RunsMethods:
    """Loads the program; tests put another in its place."""
    from flashpte.export.runtime.program import Program

    return Program.open(
        options.model_dir, unverified=options.unverified, cuda_graphs=options.cuda_graph, progress=progress
    )


def _open(options: RunOptions, progress: StageLog) -> tuple[RunsMethods, float]:
    start = time.perf_counter()
    program = open_program(options, progress)
    program.synchronize()
    return program, time.perf_counter() - start


def _peak_bytes(program: RunsMethods) -> int | None:
    import torch

    device = getattr(program, "device", None)
    return torch.cuda.max_memory_allocated(device) if device is not None and device.type == "cuda" else None


_TASKS = {"generate": _generate, "check": _check, "profile": _profile}
