"""How much of the machine an export uses."""

from __future__ import annotations

import os

MOST = 8
"""A container may have fewer cores and less memory than it reports."""


def usable_cpus() -> int:
    """How many threads or processes can run at once, at most :data:`MOST`."""
    return min(MOST, len(os.sched_getaffinity(0)))
