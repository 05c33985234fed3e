"""``run-model``: runs an export and prints text, a check's verdict, a profile or the perplexity of a text."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from flashpte.export.cli.endings import EXIT_FAILED, EXIT_OK, quiet_libraries, report_errors, stdout_may_close
from flashpte.export.cli.progress import StageLog
from flashpte.export.cli.run_model_flags import RunOptions, build_run_parser, check_run_arguments
from flashpte.export.common.errors import ExportError
from flashpte.export.common.signals import raise_on_termination

if TYPE_CHECKING:
    from flashpte.export.runtime.language_model import RunsMethods


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``run-model``.

    Args:
        argv: the arguments after the program's name; ``None`` for those of the process.

    Returns:
        0 when done, 1 after a failure or a failed check, 2 for wrong options, 130 after Ctrl-C, 128 plus the signal's
        number after SIGTERM and SIGHUP. Every error is one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in arguments or "--verbose" in arguments

    def run() -> int:
        args = build_run_parser().parse_args(arguments)
        options = check_run_arguments(args)
        out = sys.stdout
        with StageLog(quiet=args.quiet) as progress, quiet_libraries(args.verbose), stdout_may_close(out):
            return _TASKS[options.task](options, progress, out)
        return EXIT_OK  # the reader of stdout closed the pipe

    with raise_on_termination():
        return report_errors("run-model", run, verbose=verbose)


def _generate(options: RunOptions, progress: StageLog, out: TextIO) -> int:
    from flashpte.export.cli.run_model_text import generate_text

    return generate_text(options, progress, out, lambda: _open(options, progress))


def _check(options: RunOptions, progress: StageLog, out: TextIO) -> int:
    from flashpte.export.check.check_program import check_program, computed_buffers, named_weights
    from flashpte.export.check.eager_draft import rebuild_draft
    from flashpte.export.check.eager_model import EagerModel, dense_model, eager_pair, rebuild, why_no_dense_model
    from flashpte.export.files.fused_weights import parts_of
    from flashpte.export.files.model_folder import read_folder
    from flashpte.export.models.registry import get_target
    from flashpte.export.weights.recipe import read_recipe

    folder = read_folder(options.model_dir, unverified=options.unverified)
    program, _ = _open(options, progress)
    progress("building the eager model")
    model = rebuild(folder.manifest, options.checkpoint, options.gguf_file)
    draft = rebuild_draft(folder.manifest, model, options.draft)
    own, reference = eager_pair(model, draft, get_target(str(folder.manifest["target"])).layer_state)
    recipe = read_recipe(folder.manifest.get("weight_formats"), folder.manifest["model"]["dtype"])
    dense: Callable[[], EagerModel] | str | None = None
    if recipe.quantizes:
        dense = why_no_dense_model(options.checkpoint, options.gguf_file) or (
            lambda: dense_model(folder.manifest, options.checkpoint, options.gguf_file, reference)
        )
    weights = getattr(program, "weights", None)
    if weights is not None:
        weights = parts_of(weights, folder.manifest.get("fused_weights"))
    report = check_program(
        program,
        own,
        reference,
        weights=weights,
        model_weights=named_weights(model, draft),
        computed=computed_buffers(model, draft),
        dense=dense,
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


def _perplexity(options: RunOptions, progress: StageLog, out: TextIO) -> int:
    from flashpte.export.files.model_folder import read_folder
    from flashpte.export.runtime.generate import check_prompt
    from flashpte.export.runtime.language_model import LanguageModel
    from flashpte.export.runtime.perplexity import measure, program_logits, program_window
    from flashpte.export.runtime.text import has_tokenizer, open_tokenizer, read_text

    assert options.perplexity is not None
    folder = read_folder(options.model_dir, unverified=options.unverified)
    if not has_tokenizer(folder):
        raise ExportError(f"{folder.path} has no tokenizer: export a checkpoint that has one")
    tokens = list(open_tokenizer(folder)(read_text(options.perplexity))["input_ids"])
    check_prompt(tokens, folder.constants.get("get_vocab_size"))
    program, _ = _open(options, progress)
    model = LanguageModel(program)
    window = program_window(model, options.window)
    progress(f"reading {len(tokens)} tokens")
    found = measure(tokens, window, program_logits(model))
    print(json.dumps(found.to_dict()) if options.json else found.line(), file=out)
    return EXIT_OK


def open_program(options: RunOptions, progress: Callable[[str], None]) -> RunsMethods:
    """Loads the program; tests replace this function."""
    from flashpte.export.runtime.program import Program

    return Program.open(
        options.model_dir, unverified=options.unverified, cuda_graphs=options.cuda_graph, progress=progress
    )


def _open(options: RunOptions, progress: StageLog) -> tuple[RunsMethods, float]:
    start = time.perf_counter()
    program = open_program(options, progress)
    program.synchronize()
    return program, time.perf_counter() - start


_TASKS = {"generate": _generate, "check": _check, "profile": _profile, "perplexity": _perplexity}
