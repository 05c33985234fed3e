"""The part of ``run-model --check`` that compares the layers' states, by the rules in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from flashpte.export.check.compare import Comparison, compare, worst
from flashpte.export.runtime.language_model import RunsMethods
from flashpte.export.state.layer_state import DRAFT_PART, TARGET_PART, StateRules

Held = Mapping[str, torch.Tensor]
"""The tensors that one layer holds after a sequence, by the names in its rules, without the batch dimension."""


def compare_states(
    program: RunsMethods,
    expected: Sequence[Held],
    yardsticks: Sequence[Sequence[Held]],
    *,
    part: str = TARGET_PART,
) -> tuple[list[Comparison], list[str]]:
    """Compares states layer by layer; a group's result is that of its worst layer.

    Args:
        program: the program to check, after a sequence.
        expected: what the reference's layers hold.
        yardsticks: what the layers of the eager model in the program's dtypes hold, for each of its runs.
        part: ``target`` or ``draft``.

    Returns:
        One comparison per group; and the program's states and the model's layers without a counterpart, each with the
        reason.
    """
    layers = [rules for rules in program.states if rules.part == part]
    groups: dict[str, list[Comparison]] = {}
    missing = []
    if len(layers) != len(expected):
        missing.append(
            f"{part}: the program describes {len(layers)} states, the eager model has {len(expected)} layers"
        )
    for index, (rules, truth, *runs) in enumerate(zip(layers, expected, *yardsticks, strict=False)):
        for name, fqn in rules.buffers.items():
            buffer = program.buffers.get(fqn)
            if buffer is None:
                missing.append(f"{fqn}: the program has no buffer of this name")
            elif name not in truth:
                missing.append(f"{fqn}: the eager model's layer holds no {name}")
            else:
                held, chosen = _held(rules, buffer, truth[name])
                group = f"draft {name}" if part == DRAFT_PART else f"{rules.kind} {name}"
                judged = buffer.dtype if buffer.is_floating_point() else runs[0][name].dtype
                own = [run[name][chosen] for run in runs]
                found = compare(group, f"in layer {index}", held, truth[name][chosen], own, judged)
                groups.setdefault(group, []).append(found)
    if not groups:
        missing.append(f"{part}: no state was compared")
    return [worst(group) for group in groups.values()], missing


def undescribed_buffers(program: RunsMethods) -> list[str]:
    """Buffers that methods write to but no rule describes, so that they cannot be checked."""
    described = {fqn for rules in program.states for fqn in rules.buffers.values()}
    return [f"{fqn}: the manifest describes no state that holds it" for fqn in program.buffers if fqn not in described]


def _held(rules: StateRules, buffer: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """The part of a buffer that can be compared, and the matching part of what the model holds (``truth``)."""
    if rules.compared == "last":
        return buffer[0].cpu(), ()
    slots, length = buffer.shape[2], truth.shape[1]
    first = max(0, length - slots)
    positions = torch.arange(first, length)
    return buffer[0].cpu()[:, positions % slots], (slice(None), slice(first, length))
