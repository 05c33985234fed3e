"""The flags of ``run-model``, and checks of them that need neither torch nor the model."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Literal

from flashpte.export.cli.parser import add_verbosity, check_least, new_parser, nonempty_path
from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import DEFAULT_CONTEXTS, DEFAULT_PROFILE_PREFILL

DEFAULT_NEW_TOKENS = 128

_DESCRIPTION = """\
Run a program that export-model wrote on this machine's GPU, without ExecuTorch's runtime: generate text, check the
program against the model it came from, or measure its perplexity or where its time goes."""

_EPILOG = """\
examples:
  # text, with the tokenizer that export-model copied into the folder
  run-model out --prompt "The capital of France is" --max-new-tokens 32

  # without a tokenizer
  run-model out --prompt-ids 2,105,9731 --max-new-tokens 16

  # with a draft: also time plain decode, if exported, and rounds that accept exactly 0, 2 or 4 proposals
  run-model out --prompt "The capital of France is" --force-accept 0,2,4

  # is the program right? every method against the Hugging Face model; exit code 1 if not
  run-model out --check --checkpoint gemma-4-31b-it
  run-model out --check --checkpoint gemma-4-31b-it --draft gemma-4-31b-eagle3
  run-model out --check                       # an export with --random-weights

  # perplexity of a text
  run-model out --perplexity wikitext.txt --window 1024

  # time by kernel family at two contexts, as a table and a picture
  run-model out --profile --contexts 4096,16384 --plot profile.png

exit codes: 0 done, 1 failed (a file, the GPU, a check), 2 wrong options, 130 interrupted, 143 and 129 ended by SIGTERM
and SIGHUP."""

Task = Literal["generate", "check", "profile", "perplexity"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What ``run-model`` was asked for.

    Attributes:
        model_dir: folder that export-model wrote.
        task: what to do.
        prompt: text to continue.
        prompt_ids: tokens to continue, instead of a text.
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the most likely token each time.
        seed: seed of sampling at a temperature above 0.
        chat: put the prompt into the tokenizer's chat template.
        ignore_eos: do not stop at a token that ends a text.
        force_accept: with a draft, also measure rounds that accept exactly this many proposals; one run per number.
        cuda_graph: run methods of static shape as CUDA graphs.
        unverified: run files whose hash differs from the manifest's.
        checkpoint: Hugging Face folder that was exported, for a check.
        gguf_file: GGUF file that was exported, for a check.
        draft: folder of the draft that was exported, for a check.
        contexts: tokens in the cache before the measured calls; ``None`` for the defaults that fit.
        prefill: tokens of the measured prefill; ``None`` for the default, or what fits.
        plot: file to draw the profile to.
        perplexity: text file whose perplexity is measured.
        window: most tokens of a window of that text; ``None`` for 2048, or what the caches hold.
        json: print JSON.
    """

    model_dir: Path
    task: Task = "generate"
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    ignore_eos: bool = False
    force_accept: tuple[int, ...] = ()
    cuda_graph: bool = True
    unverified: bool = False
    checkpoint: Path | None = None
    gguf_file: Path | None = None
    draft: Path | None = None
    contexts: tuple[int, ...] | None = None
    prefill: int | None = None
    plot: Path | None = None
    perplexity: Path | None = None
    window: int | None = None
    json: bool = False


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2,3") from None
    if any(number < 0 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} holds a negative number")
    return found


def build_run_parser() -> argparse.ArgumentParser:
    """The parser of ``run-model``."""
    parser = new_parser("run-model", _DESCRIPTION, _EPILOG)
    parser.add_argument("model_dir", type=nonempty_path, metavar="MODEL_DIR", help="folder that export-model wrote")

    text = parser.add_argument_group("generate")
    text.add_argument("--prompt", metavar="TEXT", help="text to continue; needs a tokenizer in MODEL_DIR")
    text.add_argument("--prompt-ids", type=_numbers, metavar="IDS", help="tokens to continue: 1,2,3")
    text.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"most tokens to generate (default: {DEFAULT_NEW_TOKENS})"
    )
    text.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token (default: 0)")
    text.add_argument("--seed", type=int, metavar="S", help="seed of sampling with --temperature (default: 0)")
    text.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    text.add_argument("--ignore-eos", action="store_true", help="do not stop at a token that ends a text")

    text.add_argument(
        "--force-accept",
        type=_numbers,
        metavar="N,N",
        help="with a draft, also measure rounds that accept exactly N proposals, one run for each N",
    )

    check = parser.add_argument_group("check")
    check.add_argument(
        "--check",
        action="store_true",
        help="compare every method with the eager Hugging Face model; exit code 1 if the program is wrong",
    )
    check.add_argument(
        "--checkpoint",
        type=nonempty_path,
        metavar="DIR",
        help="the folder that was exported; not for random weights",
    )
    check.add_argument("--gguf-file", type=nonempty_path, metavar="FILE", help="the GGUF file that was exported")

    check.add_argument(
        "--draft",
        type=nonempty_path,
        metavar="DIR",
        help="the draft folder that was exported; not for a random draft",
    )

    profile = parser.add_argument_group("profile")
    profile.add_argument("--profile", action="store_true", help="measure time by kernel family")
    profile.add_argument(
        "--contexts",
        type=_numbers,
        metavar="N,N",
        help="tokens in the cache before the measured calls "
        f"(default: those of {','.join(map(str, DEFAULT_CONTEXTS))} that fit)",
    )
    profile.add_argument(
        "--prefill",
        type=int,
        metavar="N",
        help=f"tokens of the measured prefill, in chunks (default: {DEFAULT_PROFILE_PREFILL}, or what fits)",
    )
    profile.add_argument("--plot", type=nonempty_path, metavar="FILE", help="draw the profile (.png; needs matplotlib)")

    quality = parser.add_argument_group("perplexity")
    quality.add_argument(
        "--perplexity",
        type=nonempty_path,
        metavar="FILE",
        help="measure the perplexity of a text by target_verify or decode; needs a tokenizer in MODEL_DIR",
    )
    quality.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens of one window; windows do not overlap (default: 2048, or what the caches hold)",
    )

    run = parser.add_argument_group("running")
    run.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run methods of static shape as CUDA graphs (default: yes)",
    )
    run.add_argument("--unverified", action="store_true", help="run files whose hash differs from manifest.json")
    run.add_argument("--json", action="store_true", help="print JSON on stdout, nothing else")
    add_verbosity(run)
    return parser


def check_run_arguments(args: argparse.Namespace) -> RunOptions:
    """Checks everything that can be known without loading torch or the model.

    Raises:
        UsageError: flags are missing, out of range or in conflict.
        ExportError: a folder does not exist, is not a folder, or cannot be read.
    """
    task = _task(args)
    _check_belonging(args, task)
    if task == "generate" and (args.prompt is None) == (args.prompt_ids is None):
        have = "both were given" if args.prompt is not None else "none was given"
        raise UsageError(f"give --prompt TEXT or --prompt-ids IDS, --check, --profile or --perplexity FILE ({have})")
    if args.chat and args.prompt is None:
        raise UsageError("--chat needs --prompt: tokens are fed as they are")
    if args.seed is not None and not args.temperature:
        raise UsageError("--seed belongs to --temperature T, which is 0")
    if args.verbose and args.quiet:
        raise UsageError("--verbose and --quiet cannot be combined: they are opposites")
    check_least(
        (
            ("--max-new-tokens", args.max_new_tokens, 1),
            ("--seed", args.seed, 0),
            ("--prefill", args.prefill, 1),
            ("--window", args.window, 2),
        )
    )
    if args.temperature is not None and not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise UsageError(f"--temperature {args.temperature}: must be 0 or more")
    if args.contexts is not None and 0 in args.contexts:
        raise UsageError("--contexts: must be at least 1")
    if args.plot is not None and args.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {args.plot}: must end in .png, .svg or .pdf")
    for flag, path in (("MODEL_DIR", args.model_dir), ("--checkpoint", args.checkpoint), ("--draft", args.draft)):
        _check_folder(flag, path)
    for flag, path in (("--gguf-file", args.gguf_file), ("--perplexity", args.perplexity)):
        if path is not None and not path.is_file():
            raise ExportError(f"{flag} {path} is not an existing file")
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise ExportError(f"--plot {args.plot}: the folder {args.plot.absolute().parent} does not exist")
    return RunOptions(
        model_dir=args.model_dir,
        task=task,
        prompt=args.prompt,
        prompt_ids=args.prompt_ids,
        max_new_tokens=args.max_new_tokens or DEFAULT_NEW_TOKENS,
        temperature=args.temperature or 0.0,
        seed=args.seed or 0,
        chat=args.chat,
        ignore_eos=args.ignore_eos,
        force_accept=args.force_accept or (),
        cuda_graph=args.cuda_graph,
        unverified=args.unverified,
        checkpoint=args.checkpoint,
        gguf_file=args.gguf_file,
        draft=args.draft,
        contexts=args.contexts,
        prefill=args.prefill,
        plot=args.plot,
        perplexity=args.perplexity,
        window=args.window,
        json=args.json,
    )


def _task(args: argparse.Namespace) -> Task:
    tasks: dict[Task, bool] = {
        "check": args.check,
        "profile": args.profile,
        "perplexity": args.perplexity is not None,
    }
    wanted = [task for task, given in tasks.items() if given]
    if len(wanted) > 1:
        raise UsageError(f"--{wanted[0]} and --{wanted[1]} cannot be combined: run them one after the other")
    return wanted[0] if wanted else "generate"


def _check_belonging(args: argparse.Namespace, task: Task) -> None:
    belonging: dict[Task, tuple[str, ...]] = {
        "generate": (
            *("--prompt", "--prompt-ids", "--max-new-tokens", "--temperature", "--seed", "--chat", "--ignore-eos"),
            "--force-accept",
        ),
        "check": ("--checkpoint", "--gguf-file", "--draft"),
        "profile": ("--contexts", "--prefill", "--plot"),
        "perplexity": ("--window",),
    }
    for owner, flags in belonging.items():
        for flag in flags:
            value = getattr(args, flag[2:].replace("-", "_"))
            if owner != task and value is not None and value is not False:
                what = {name: f"--{name}" for name in belonging} | {"generate": "generating text"}
                raise UsageError(f"{flag} belongs to {what[owner]}, this is {what[task]}")


def _check_folder(flag: str, path: Path | None) -> None:
    if path is None:
        return
    try:
        if not path.is_dir():
            raise ExportError(f"{flag} {path} {'is not a folder' if path.exists() else 'does not exist'}")
    except OSError as error:
        raise ExportError(f"{flag} {path} cannot be read: {error.strerror}") from error
