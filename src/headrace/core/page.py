"""Pages that are bounded by bytes: how many entries fit, at least one, so that every reader makes progress."""

from __future__ import annotations

from collections.abc import Iterable


def count_within(sizes: Iterable[int], bytes_max: int) -> int:
    """Return how many of the first entries have at most `bytes_max` together; 1 if the first alone has more."""
    count = held_bytes = 0
    for size in sizes:
        held_bytes += size
        if count and held_bytes > bytes_max:
            break
        count += 1
    return count
