"""The part of ``run-model --check`` that checks ``draft_decode``: its features, proposals, keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from flashpte.export.check.agreement import Agreement, judge
from flashpte.export.check.check_states import compare_states
from flashpte.export.check.compare import Comparison, compare
from flashpte.export.common.options import DRAFT_DECODE
from flashpte.export.state.layer_state import DRAFT_PART

if TYPE_CHECKING:
    from flashpte.export.check.eager_model import EagerModel
    from flashpte.export.runtime.language_model import RunsMethods

_STEPS = 24  # consecutive calls of one row, as a chain makes them
_SEED = 2


@dataclasses.dataclass(frozen=True)
class Rows:
    """One call: ``count`` rows from position ``start``."""

    start: int
    count: int

    @property
    def end(self) -> int:
        """The position after its last row."""
        return self.start + self.count


def plan_draft_walk(least: int, most: int, length: int) -> tuple[Rows, ...]:
    """Calls that fill a draft's cache: they have many lengths, step back as after rejections, and end at the last slot.

    Args:
        least: fewest rows of a call.
        most: most rows of a call.
        length: number of positions in the cache.
    """
    steps: list[Rows] = []
    position = 0

    def add(count: int) -> None:
        nonlocal position
        count = max(least, min(count, most))
        start = min(position, length - count)
        if start >= 0:
            steps.append(Rows(start, count))
            position = start + count

    for count in (most, 1, 5, 17, 2, 16, most // 2 + 1, most - 1, 3):
        if position + count > length // 2:
            continue
        add(count)
        position -= count // 2 if count <= 16 else 0  # step back over the part of the chain that was rejected
    for _ in range(min(_STEPS, (length - position) // 4)):
        add(1)
    while position < length - 2 * most:
        add(most)
        add(1)
    while position < length - _STEPS - 1:
        add(min(most, length - _STEPS - position))
    while position < length:
        add(1)
    return tuple(steps)


def check_draft(
    program: RunsMethods,
    own: EagerModel,
    reference: EagerModel,
    tokens: Sequence[int],
    features: torch.Tensor,
) -> tuple[list[Comparison], Agreement, list[str]]:
    """Runs ``draft_decode`` through its whole cache and compares it with the drafts of two eager models.

    The drafts read the same features as the program, so the comparison covers the draft alone.

    Args:
        program: the program to check; its draft's cache is overwritten.
        own: the eager model in the program's dtype, with its draft.
        reference: the same model in a wider dtype.
        tokens: N tokens of a sequence.
        features: [N, C], the features of their positions, in the program's dtype.

    Returns:
        Comparisons of features, keys and values; the agreement of the proposals; and what could not be compared.
    """
    assert own.draft is not None
    assert reference.draft is not None
    vocabulary = int(program.constants["get_vocab_size"])
    last = torch.randint(0, vocabulary, (1,), generator=torch.Generator().manual_seed(_SEED))
    following = [*tokens[1:], int(last)]
    size = program.signatures[DRAFT_DECODE].inputs[0].shape[1]
    least, most = (size, size) if isinstance(size, int) else (size[0], size[1] or len(tokens))
    steps = plan_draft_walk(least, most, len(tokens))
    proposals, after = [], []
    for step in steps:
        inputs = (
            torch.tensor([following[step.start : step.end]]),
            features[None, step.start : step.end],
            torch.arange(step.start, step.end),
        )
        proposal, feature = program.run(DRAFT_DECODE, *inputs)
        program.synchronize()  # report a device error at this call
        proposals.append(int(proposal))
        after.append(feature[0, -1].cpu())
    rows = [step.end - 1 for step in steps]
    truth, yardstick = (eager.draft.evaluate(following, features, rows) for eager in (reference, own) if eager.draft)
    actual = torch.stack(after)
    worst = int((actual.double() - truth.features.double()).abs().amax(-1).nan_to_num(nan=torch.inf).argmax())
    where = f"at position {rows[worst]} ({steps[worst].count} rows from {steps[worst].start})"
    found = [
        compare("draft_decode features", where, actual, truth.features, yardstick.features, yardstick.features.dtype)
    ]
    states, missing = compare_states(program, [truth.held], [[yardstick.held]], part=DRAFT_PART)
    found += states
    allowed = compare("", "", yardstick.logits, truth.logits, yardstick.logits, yardstick.logits.dtype).max_allowed
    # proposals as ids of the draft's vocabulary, which may differ from the target's
    meant = [reference.draft.to_draft_id(proposal) for proposal in proposals]
    return found, judge(torch.tensor(meant), truth.logits, 2 * allowed), missing
