"""Dividing a prompt into calls."""

from __future__ import annotations


def chunk_bounds(count: int, least: int, most: int, *, fed_twice: bool = False) -> list[tuple[int, int]] | None:
    """Bounds ``(start, end)`` of calls of ``least`` to ``most`` tokens that feed ``count`` tokens.

    Calls take as many tokens as they may, from the front. What would be left for the last one and is too short is taken
    from the one before. Where no such sizes add up, the last call begins within the one before, if tokens may be fed
    twice.

    Returns:
        The bounds; ``None`` where no calls fit.
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
