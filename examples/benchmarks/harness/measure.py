"""One case: every runner is checked, then all that are right are timed, taking turns."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from harness.cases import Case
from harness.inputs import LARGEST_ERROR, Inputs
from harness.ours import POSITIONS, map_makers
from harness.prepare import SWEEP, describe
from harness.runner import Runner, Variant
from harness.sweep import sweep
from harness.timing import graph_times, plain_time, time_us

Failed = dict[tuple[str, str], str]


class DeviceLost(RuntimeError):
    """An error after which this process can use the GPU no longer; its row says whose it was."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__("the GPU context is lost")
        self.row = row


def device_is_alive() -> bool:
    """Whether the GPU still takes work from this process."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception:
        return False
    return True


def _checked(runner: Runner, inputs: Inputs, entry: dict[str, Any]) -> dict[str, Variant]:
    """The variants of a runner whose result is right; what is wrong is noted."""
    right = {}
    for name, variant in runner.variants(inputs).items():
        try:
            error = inputs.error(variant.result)
        except Exception as caught:  # the others may still run
            entry["failed"] = describe(caught)
            continue
        if error <= LARGEST_ERROR:
            right[name] = variant
            entry["error"] = max(error, entry.get("error", 0.0))
        else:
            entry["failed"] = f"wrong: relative error {error:.3g}"
    if right:
        entry.pop("failed", None)
    return right


def measure(case: Case, runners: Sequence[Runner], failed: Failed, ceilings: dict[str, float]) -> dict[str, Any]:
    """A row of results.

    Args:
        case: what to measure.
        runners: who; those that refuse the case are listed with their reason.
        failed: reasons by ``runner, case`` of what is not to be tried.
        ceilings: of this GPU.

    Returns:
        The case, its floor, the map's time by runner, and for each runner under ``times`` the microseconds of a call
        (``graph``, ``plain``), the fastest ``variant``, the relative ``error``; or why there is none (``failed``).

    Raises:
        DeviceLost: a runner made the GPU unusable.
    """
    row: dict[str, Any] = {**case.describe(), "floor": case.floor(ceilings), "layers": case.shape.layers, "times": {}}
    try:
        _fill(row, case, runners, failed)
    except Exception as error:
        if device_is_alive():
            raise
        raise DeviceLost(row) from error
    gc.collect()
    torch.cuda.empty_cache()
    if not device_is_alive():
        raise DeviceLost(row)
    return row


def _fill(row: dict[str, Any], case: Case, runners: Sequence[Runner], failed: Failed) -> None:
    """Checks and times everybody."""
    inputs = Inputs.make(case)
    variants: dict[tuple[str, str], Variant] = {}
    plain_only = {runner.label for runner in runners if runner.plain_only}
    for runner in runners:
        entry = row["times"].setdefault(runner.label, {})
        reason = runner.refuses(case) or failed.get((runner.label, case.key))
        if reason is not None:
            entry["failed"] = reason
            continue
        try:
            for name, variant in _checked(runner, inputs, entry).items():
                variants[runner.label, name] = variant
        except Exception as error:
            entry["failed"] = describe(error)
        if "failed" in entry and not device_is_alive():
            raise DeviceLost(row)
    names = {f"{label}|{name}": (label, name) for label, name in variants if label not in plain_only}
    for key, time in graph_times({key: variants[names[key]].calls for key in names}).items():
        _note(row["times"], *names[key], "graph", time)
    for (label, name), variant in variants.items():
        # The variant that won by graph stands for its runner; loops are too long to try all.
        if row["times"][label].get("variant", name) == name:
            try:
                _note(row["times"], label, name, "plain", plain_time(variant.calls) / variant.attentions)
            except Exception as error:
                _note(row["times"], label, name, "plain", error)
    makers = map_makers(inputs)
    row["map"] = {label: time_us([makers[label]] * 4) for label in makers if "graph" in row["times"].get(label, {})}
    if case.suite == "other" and (SWEEP, case.key) not in failed and "graph" in row["times"].get(POSITIONS, {}):
        try:
            row["sweep"] = sweep(inputs)
        except Exception as error:
            row["sweep"] = {"failed": describe(error)}


def _note(times: dict[str, Any], label: str, name: str, mode: str, time: float | Exception) -> None:
    """Keeps a time if it is the runner's best, or the error if it has none."""
    entry = times[label]
    if isinstance(time, Exception):
        if mode not in entry:
            entry["failed" if mode == "graph" else "failed plain"] = describe(time)
    elif time < entry.get(mode, float("inf")):
        entry[mode] = time
        entry["variant"] = name
        entry.pop("failed", None)
