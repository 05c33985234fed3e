"""What benchmarks of whole models share: exports made side by side, each in a process of its own, and their profiles.

    python examples/benchmarks/exports.py --methods target_verify decode -- --target gemma4-31b ... --output-dir out

is export-model for some of the methods that its flags ask for.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashpte.export.runtime.profile import ProfileReport


def write_config(folder: Path, *, small: bool, vocabulary: int) -> Path:
    """Gemma 4 31B at full width with a smaller vocabulary, or the small Gemma 4, as a config.json in a folder."""
    from flashpte.export.models.gemma4 import GEMMA4_31B, GEMMA4_SMALL

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(GEMMA4_SMALL if small else {**GEMMA4_31B, "vocab_size": vocabulary}))
    return path


def recorded(args: argparse.Namespace) -> dict[str, str]:
    """Arguments as a result holds them: those that say what was measured, not where files lie."""
    return {name: str(value) for name, value in vars(args).items() if not isinstance(value, Path) and value is not None}


def export_side_by_side(
    work_dir: Path, arguments: Mapping[str, Sequence[str]], methods: Mapping[str, Collection[str]] | None = None
) -> dict[str, Path]:
    """Runs export-model for every kind at once; what a folder already holds is kept.

    Args:
        work_dir: where each kind gets a folder and a file with what its export printed.
        arguments: of export-model by kind, without the folder.
        methods: the only methods to export, by kind.

    Returns:
        The folders by kind, of the exports that succeeded.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    folders = {kind: work_dir / kind for kind in arguments}
    running = {}
    for kind, folder in folders.items():
        if (folder / "manifest.json").is_file():
            continue
        only = ["--methods", *methods[kind]] if methods is not None and kind in methods else []
        command = [sys.executable, "-W", "ignore", __file__, *only, "--", *arguments[kind], "--output-dir", str(folder)]
        with folder.with_suffix(".log").open("w") as log:
            running[kind] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    for kind, process in running.items():
        if process.wait() != 0:
            said = folders[kind].with_suffix(".log").read_text().splitlines()[-1:]
            print(f"{kind}: export failed: {said}", file=sys.stderr)
            del folders[kind]
    return folders


def profile_export(
    folder: Path, contexts: Sequence[int], prefill: int | None, *, cuda_graph: bool, unverified: bool = False
) -> ProfileReport:
    """The profile of one export on this machine's GPU, which is empty again afterwards."""
    import torch

    from flashpte.export.runtime import Program
    from flashpte.export.runtime.profile import plan_profile, profile_program

    program = Program.open(folder, cuda_graphs=cuda_graph, unverified=unverified)
    report = profile_program(program, plan_profile(program, contexts, prefill))
    del program
    gc.collect()
    torch.cuda.empty_cache()
    return report


def main() -> int:
    from flashpte.export.cli.export_model_flags import build_parser, check_arguments
    from flashpte.export.cli.progress import StageLog
    from flashpte.export.pipeline import export_model, plan_export

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("arguments", nargs="+")
    chosen = parser.parse_args()
    args = build_parser().parse_args(chosen.arguments)
    plan = plan_export(check_arguments(args))
    if chosen.methods is not None:
        plan = dataclasses.replace(plan, methods=tuple(m for m in plan.methods if m.name in chosen.methods))
    with StageLog() as progress:
        export_model(plan, args.output_dir, arch=args.arch, format=args.format, progress=progress)
    return 0


if __name__ == "__main__":
    sys.exit(main())
