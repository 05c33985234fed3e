"""Who can run a case, by name."""

from __future__ import annotations

from harness import external, ours, peers
from harness.runner import Runner

RUNNERS: dict[str, Runner] = {runner.label: runner for runner in (*ours.RUNNERS, *peers.RUNNERS, *external.RUNNERS)}
PEERS = tuple(label for label, runner in RUNNERS.items() if not runner.ours)


def chosen(peers_wanted: list[str] | None) -> list[Runner]:
    """Our own runners, and the peers whose name starts with one of those wanted (all by default)."""

    def wanted(runner: Runner) -> bool:
        return runner.ours or peers_wanted is None or any(runner.label.startswith(name) for name in peers_wanted)

    return [runner for runner in RUNNERS.values() if wanted(runner)]
