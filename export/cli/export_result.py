"""What ``export-model`` prints when an export is done."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashpte.export.cli.flag_names import flag_name

if TYPE_CHECKING:
    from flashpte.export.lowering import LoweredModel
    from flashpte.export.pipeline import ExportPlan
    from flashpte.passes import RoutingReport


def print_result(plan: ExportPlan, lowered: Sequence[LoweredModel], reports: Mapping[str, RoutingReport]) -> None:
    """Prints the routing table, the written files (none after a dry run), notes and what to type next."""
    from flashpte.passes import format_table

    options = plan.options
    if reports:
        print(format_table(reports))
    else:
        print(f"attention was not replaced (--no-replace {options.attention})")
    if reports and not options.midm_sdpa:
        print("target_verify: attention was not replaced (--no-midm-sdpa)")
    for model in lowered:
        print()
        for path in sorted(model.folder.iterdir()):
            print(file_line(path))
    if len(lowered) > 1:
        print("\nequal files, such as the weights, are on the disk once (hard links)")
    for note in (*plan.model_notes, *(f"weights: {note}" for note in plan.weight_notes)):
        print(note)
    if lowered:
        print(_next(plan, lowered[0]))


def _next(plan: ExportPlan, model: LoweredModel) -> str:
    """What to type next."""
    folder = shlex.quote(str(model.folder))
    if plan.runner is not None:
        files = " ".join(path.name for path in (model.model, model.weights) if path is not None)
        return f"next: give {files} of {folder} to {plan.runner.title} (docs/executorch.md)"
    source = "".join(
        f" {flag_name(name)} {shlex.quote(str(path))}"
        for name in ("checkpoint", "gguf_file", "draft")
        if (path := getattr(plan.options, name)) is not None
    )
    check = "" if model.weights is None else f"  run-model {folder} --check{source}\n"
    prompt = '--prompt "The capital of France is"' if plan.extra_files else "--prompt-ids 1,2,3"
    return f"next, on an {model.arch} GPU:\n{check}  run-model {folder} {prompt}\n  run-model {folder} --profile"


def file_line(path: Path) -> str:
    """The size and the path of a file."""
    return f"{_size(path.stat().st_size):>10}  {path}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
