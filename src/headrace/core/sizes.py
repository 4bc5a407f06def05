"""The sizes of an indexer's batches.

Commits run beside the handlers of the next batch. The first batch has no commit beside it, and the last commit no
handlers. Few events in both make these ends short. Batches grow to the allowed size, and once the number of remaining
events is known, half of them are taken at a time (guided self-scheduling; Polychronopoulos and Kuck, 1987).
"""

from __future__ import annotations

from typing import Final

LEAST: Final = 500
"""Fewer events are not worth a commit."""

FIRST_SHARE: Final = 8
"""The first batch is the largest size divided by this."""


class Sizes:
    """Sizes of one run. `most`: the allowed size; `is_even`: each batch has that size, since no commit runs beside
    handlers.
    """

    def __init__(self, most: int, *, is_even: bool = False) -> None:
        self._most = most
        self._least = most if is_even else min(most, LEAST)
        self._size = max(self._least, most // FIRST_SHARE)

    def size(self, left: int | None) -> int:
        """Return the size of the next batch. `left`: number of remaining events, None if unknown."""
        return self._size if left is None else min(self._size, max(self._least, (left + 1) // 2))

    def grow(self) -> None:
        """Note that a batch was taken."""
        self._size = min(2 * self._size, self._most)
