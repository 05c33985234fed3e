"""``run-model --check``: compares a program with the eager Hugging Face model that it was exported from.

The check compares:

* the logits of every method, along a walk through the whole cache;
* the states after the walk (keys and values, or whatever else a layer remembers), by group of layers;
* the weights, byte for byte;
* the choices along a greedy sequence of the eager model;
* for a quantized model, the logits with those of the dense model: a measurement, which no check fails.

Logits alone are not enough: slightly wrong attention moves them little, but shows in the keys of later layers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flashpte.export.check.accuracy import LABEL, Accuracy, compare_with_dense
from flashpte.export.check.agreement import Agreement, judge
from flashpte.export.check.check_draft import check_draft
from flashpte.export.check.check_states import compare_states, undescribed_buffers
from flashpte.export.check.check_weights import WeightsReport, compare_weights, weights_of_methods
from flashpte.export.check.compare import Comparison, compare
from flashpte.export.check.eager_model import EagerModel, Evaluation
from flashpte.export.check.runs import compare_with_runs
from flashpte.export.check.walk import Step, plan_walk
from flashpte.export.common.options import DRAFT_DECODE, METHOD_NAMES, PREFILL, TARGET_METHODS, TARGET_VERIFY
from flashpte.export.common.tables import table_lines
from flashpte.export.pipeline.draft_plan import DraftPlan
from flashpte.export.runtime.language_model import LanguageModel, RunsMethods

TEACHER_TOKENS = 200
_SEED = 1


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        comparisons: one for each method's logits, each method's features and each group of states.
        agreement: of the choices along the greedy sequence; ``None`` without a decode method.
        proposals: agreement of the draft's proposals; ``None`` without a draft.
        weights: result of comparing the weights; ``None`` where the program's cannot be read.
        missing: what should have been compared but was not, each with the reason.
        unchecked: methods that were not compared with anything.
        calls: number of calls of each of the target's methods.
        accuracy: of the quantized model against the dense one, or why there is none; ``None`` for a dense model.
    """

    comparisons: tuple[Comparison, ...]
    agreement: Agreement | None
    proposals: Agreement | None
    weights: WeightsReport | None
    missing: tuple[str, ...]
    unchecked: tuple[str, ...]
    calls: Mapping[str, int]
    accuracy: Accuracy | str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything was compared and is within its bounds."""
        agrees = all(found is None or found.passed for found in (self.agreement, self.proposals))
        compared = bool(self.comparisons) and not self.not_compared
        return all(c.passed for c in self.comparisons) and agrees and compared and not self.weights_different

    @property
    def weights_equal(self) -> int:
        """Number of tensors that equal the model's, byte for byte."""
        return 0 if self.weights is None else self.weights.equal

    @property
    def weights_different(self) -> tuple[str, ...]:
        """Names of tensors that differ from the model's."""
        return () if self.weights is None else self.weights.different

    @property
    def not_compared(self) -> tuple[str, ...]:
        """Everything that was not compared, each with the reason; a check passes only if this is empty."""
        weights = () if self.weights is None else self.weights.missing
        methods = (f"method {name}: no eager model to compare it with" for name in self.unchecked)
        return (*self.missing, *weights, *methods)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {
            "passed": self.passed,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "teacher_forced": _agreement_dict(self.agreement),
            "proposals": _agreement_dict(self.proposals),
            "weights": {
                "read": self.weights is not None,
                "equal": self.weights_equal,
                "different": list(self.weights_different),
                "unused": [] if self.weights is None else list(self.weights.unused),
            },
            "not_compared": list(self.not_compared),
            "unchecked_methods": list(self.unchecked),
            "calls": dict(self.calls),
            "accuracy": self.accuracy.to_dict() if isinstance(self.accuracy, Accuracy) else self.accuracy,
        }

    def lines(self) -> list[str]:
        """The report for people: a table, the greedy sequence, the weights, and what is wrong."""
        rows: list[tuple[str, ...]] = [("", "max error", "allowed", "relative", "allowed", "values", "")]
        for c in self.comparisons:
            verdict = "ok" if c.passed else f"WRONG, worst {c.worst}"
            errors = (c.max_error, c.max_allowed, c.relative_error, c.relative_allowed)
            rows.append((c.what, *(f"{value:.3g}" for value in errors), str(c.values), verdict))
        lines = table_lines(rows, ragged=True)
        lines.append("calls: " + ", ".join(f"{count} {name}" for name, count in self.calls.items()))
        if self.agreement is not None:
            lines += self.agreement.lines("teacher-forced", "greedy tokens")
        if self.proposals is not None:
            lines += self.proposals.lines("draft", "proposals")
        if self.weights is None:
            lines.append("weights: not compared byte for byte, they are inside of the compiled code")
        else:
            lines.append(f"weights: {self.weights_equal} tensors equal byte for byte")
            if unused := self.weights.unused:
                named = ", ".join(unused[:5])
                lines.append(f"weights: {len(unused)} of the checkpoint are in no exported method: {named}")
        if self.accuracy is not None:
            found = self.accuracy
            lines.append(found.line() if isinstance(found, Accuracy) else f"{LABEL}: not measured, {found}")
        if self.weights_different:
            named = ", ".join(self.weights_different[:5])
            lines.append(f"weights: WRONG, {len(self.weights_different)} differ: {named}")
        lines += [f"NOT COMPARED: {what}" for what in self.not_compared[:5]]
        if len(self.not_compared) > 5:
            lines.append(f"NOT COMPARED: {len(self.not_compared) - 5} more")
        lines.append("check passed" if self.passed else "check FAILED")
        return lines


def _agreement_dict(found: Agreement | None) -> dict[str, Any] | None:
    return None if found is None else {**dataclasses.asdict(found), "passed": found.passed}


def check_program(
    program: RunsMethods,
    own: EagerModel,
    reference: EagerModel,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    model_weights: Mapping[str, torch.Tensor] | None = None,
    computed: Mapping[str, torch.Tensor] | None = None,
    dense: Callable[[], EagerModel] | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    """Runs a program and compares it with two eager models.

    Args:
        program: the program to check; its buffers are overwritten and reset.
        own: the eager model in the program's dtype, the yardstick; has a draft if the program has one.
        reference: the same model in a wider dtype, the truth.
        weights: the program's tensors by FQN, to compare with ``model_weights``; ``None`` if they cannot be read.
        model_weights: the model's weights by FQN, see :func:`named_weights`.
        computed: buffers that the model computes, see :func:`computed_buffers`.
        dense: makes the model without quantized weights, or says why there is none; ``None`` for a dense program.
        progress: called with a short line at each stage.

    Raises:
        ProgramError: the program is not a language model, or failed to run.
    """
    tell = progress or (lambda stage: None)
    model = LanguageModel(program)
    compared_weights = None
    if weights is not None:
        used = weights_of_methods(model_weights or {}, program.signatures)
        compared_weights = dataclasses.replace(
            compare_weights(weights, used, computed=computed, states=program.buffers),
            unused=tuple(name for name in model_weights or {} if name not in used),
        )
    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = int(program.constants["get_vocab_size"])
    tokens = torch.randint(0, vocabulary, (model.limits.max_seq_len,), generator=generator).tolist()
    steps = plan_walk(model.limits)
    tell(f"walking through {max(step.end for step in steps)} positions in {len(steps)} calls")
    results = _walk(model, tokens, steps)
    end = max(step.end for step in steps)
    rows = sorted({position for step, logits, _ in results for position in _rows(step, logits)})
    tell("evaluating the eager model")
    expected = reference.evaluate(tokens[:end], rows)
    missing: list[str] = []

    def compare_walk(runs: Sequence[Evaluation]) -> list[Comparison]:
        found, missing[:] = compare_states(program, expected.states, [run.states for run in runs])
        logits, features = _compare_logits(results, rows, expected, runs), _compare_features(results, expected, runs)
        return logits + features + found

    comparisons, yardstick = compare_with_runs(own, tokens[:end], rows, compare_walk, tell)
    features = yardstick.features
    proposals = None
    if DRAFT_DECODE in program.signatures and features is not None:
        tell("walking with the draft")
        found, proposals, absent = check_draft(program, own, reference, tokens[:end], features)
        comparisons += found
        missing += absent
    agreement = None
    if model.limits.decode:
        tell("following a greedy sequence")
        teacher, agreement = _follow_greedy(model, own, reference, tokens, tell)
        comparisons.append(teacher)
    accuracy: Accuracy | str | None = dense if isinstance(dense, str) else None
    if callable(dense):
        tell("evaluating the unquantized model")
        accuracy = compare_with_dense(expected.logits, dense().evaluate(tokens[:end], rows).logits)
    model.reset()
    missing += undescribed_buffers(program)
    missing += _missing(program.signatures, features, comparisons, proposals)
    counts = Counter(step.method for step in steps)
    checked = TARGET_METHODS if proposals is None else METHOD_NAMES
    return CheckReport(
        comparisons=tuple(comparisons),
        agreement=agreement,
        proposals=proposals,
        weights=compared_weights,
        missing=tuple(missing),
        unchecked=tuple(name for name in program.signatures if name not in checked),
        calls={name: counts[name] for name in program.signatures if name in TARGET_METHODS},
        accuracy=accuracy,
    )


def _missing(
    methods: Mapping[str, Any],
    features: torch.Tensor | None,
    comparisons: Sequence[Comparison],
    proposals: Agreement | None,
) -> list[str]:
    """Results of methods that were not compared, each with the reason."""
    compared = {comparison.what for comparison in comparisons}
    wanted = [(name, "logits") for name in TARGET_METHODS if name in methods]
    if features is not None:
        wanted += [(name, "features") for name in (PREFILL, TARGET_VERIFY) if name in methods]
    found = [f"{name} {what}: no call returned any" for name, what in wanted if f"{name} {what}" not in compared]
    if proposals is not None and not proposals.above:
        found.append(f"draft proposals: none has a top-2 margin above {proposals.tolerance:.3g}, any choice would pass")
    return found


Results = list[tuple[Step, torch.Tensor, torch.Tensor | None]]  # logits [1 or M, V]; features [T, C] with a draft


def named_weights(model: nn.Module, draft: DraftPlan | None = None) -> dict[str, torch.Tensor]:
    """The weights of a model and its draft, by their FQNs in a program."""
    parts = _parts(model, draft)
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def computed_buffers(model: nn.Module, draft: DraftPlan | None = None) -> dict[str, torch.Tensor]:
    """The buffers that a model and its draft compute and no checkpoint holds, by their FQNs in a program."""
    stored = named_weights(model, draft)
    parts = _parts(model, draft)
    found = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_buffers()}
    return {name: value for name, value in found.items() if name not in stored}


def _parts(model: nn.Module, draft: DraftPlan | None) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {"model": model}
    return parts if draft is None else {**parts, "feature_fusion": draft.fusion, "draft": draft.head}


def _walk(model: LanguageModel, tokens: Sequence[int], steps: Sequence[Step]) -> Results:
    model.reset()
    results: Results = []
    for step in steps:
        model.move_back(step.start)
        logits = model.call(step.method, tokens[step.start : step.end])
        model.program.synchronize()  # report a device error at this call
        if step.compared:
            results.append((step, logits[0].cpu(), None if model.features is None else model.features[0].cpu()))
    return results


def _rows(step: Step, logits: torch.Tensor) -> range:
    """The positions whose logits a call returns: those of all its tokens (``target_verify`` must) or of the last."""
    every = logits.shape[0] == step.count or step.method == TARGET_VERIFY
    return range(step.start if every else step.end - 1, step.end)


def _compare_logits(
    results: Results,
    rows: Sequence[int],
    expected: Evaluation,
    yardsticks: Sequence[Evaluation],
) -> list[Comparison]:
    at = {position: index for index, position in enumerate(rows)}
    comparisons = []
    for method in dict.fromkeys(step.method for step, _, _ in results):
        mine = [(step, logits) for step, logits, _ in results if step.method == method]
        indices = [at[position] for step, logits in mine for position in _rows(step, logits)]
        actual = torch.cat([logits for _, logits in mine])
        truth = expected.logits[indices]
        position = rows[indices[_worst_row(actual, truth)]]
        where = next(s for s, logits in mine if position in _rows(s, logits))
        name = f"at position {position} ({where.count} tokens from {where.start})"
        own = [run.logits[indices] for run in yardsticks]
        comparisons.append(compare(f"{method} logits", name, actual, truth, own, own[0].dtype))
    return comparisons


def _worst_row(actual: torch.Tensor, truth: torch.Tensor) -> int:
    """The row of ``[N, C]`` with the largest error; 0 where the shapes differ."""
    if actual.shape != truth.shape:
        return 0
    return int((actual.double() - truth.double()).abs().amax(-1).nan_to_num(nan=torch.inf).argmax())


def _compare_features(results: Results, expected: Evaluation, yardsticks: Sequence[Evaluation]) -> list[Comparison]:
    """Compares the features that the target's methods hand to the draft, by method."""
    own = [run.features for run in yardsticks if run.features is not None]
    if expected.features is None or not own:
        return []
    calls: dict[str, list[tuple[Step, torch.Tensor]]] = {}
    for step, _, features in results:
        if features is not None:
            calls.setdefault(step.method, []).append((step, features))
    comparisons = []
    for method, mine in calls.items():
        rows = [row for step, _ in mine for row in range(step.start, step.end)]
        actual, truth = torch.cat([features for _, features in mine]), expected.features[rows]
        where = f"at position {rows[_worst_row(actual, truth)]}"
        allowed = [run[rows] for run in own]
        comparisons.append(compare(f"{method} features", where, actual, truth, allowed, own[0].dtype))
    return comparisons


def _follow_greedy(
    model: LanguageModel,
    own: EagerModel,
    reference: EagerModel,
    tokens: Sequence[int],
    tell: Callable[[str], None],
) -> tuple[Comparison, Agreement]:
    length = model.limits.max_seq_len
    window = min((rules.most_back for rules in model.program.states if rules.most_back is not None), default=None)
    prompt = list(tokens[: max(1, min(window or 64, length - TEACHER_TOKENS, length // 4 + 1))])
    if model.limits.prefill is not None and len(prompt) < model.limits.prefill[0]:
        prompt = list(tokens[: model.limits.prefill[0]])
    count = min(TEACHER_TOKENS, length - len(prompt) + 1)
    forced = reference.greedy(prompt, count)
    model.reset()
    logits = [model.prefill(prompt)]
    logits += [model.decode(token) for token in forced[:-1]]
    actual = torch.cat([row[0, -1:].cpu() for row in logits])
    sequence, rows = prompt + forced[:-1], list(range(len(prompt) - 1, len(prompt) - 1 + count))
    truth = reference.evaluate(sequence, rows).logits

    def compare_text(runs: Sequence[Evaluation]) -> list[Comparison]:
        own_logits = [run.logits for run in runs]
        return [compare("teacher-forced logits", "of the sequence", actual, truth, own_logits, own_logits[0].dtype)]

    (comparison,), _ = compare_with_runs(own, sequence, rows, compare_text, tell)
    return comparison, judge_choices(comparison, actual, truth)


def judge_choices(comparison: Comparison, actual: torch.Tensor, truth: torch.Tensor) -> Agreement:
    """Compares the tokens that two logits [N, V] choose, whose ``comparison`` says how far they may differ."""
    return judge(actual.argmax(-1), truth, 2 * comparison.max_allowed)
