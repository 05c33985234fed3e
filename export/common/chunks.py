"""Divides a prompt into calls."""

from __future__ import annotations


def chunk_bounds(count: int, least: int, most: int, *, fed_twice: bool = False) -> list[tuple[int, int]] | None:
    """Bounds ``(start, end)`` of calls of ``least`` to ``most`` tokens that feed ``count`` tokens.

    Each call takes as many tokens as it may. A call gives up tokens where the next one would be shorter than ``least``.
    Where no such sizes add up and ``fed_twice`` allows it, the last call feeds the last ``least`` tokens, some of them
    again.

    Returns:
        The bounds; ``None`` where no sizes add up.
    """
    calls = -(-count // most)
    if count < calls * least:
        if not fed_twice or count < least:
            return None
        bounds = [(start, min(start + most, count)) for start in range(0, count, most)]
        return [*bounds[:-1], (count - least, count)]
    bounds, start = [], 0
    for left in range(calls - 1, -1, -1):
        end = start + min(most, count - start - left * least)
        bounds.append((start, end))
        start = end
    return bounds
