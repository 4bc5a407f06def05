"""How many events a batch of an indexer gets.

Commits run under the handlers of the next batch, so the first batch has no commit beside it and the last commit no
handlers. Few events in both make these ends short: batches grow to what they may hold, and once it is known how many
events there are still, half of them are taken at a time (guided self-scheduling; Polychronopoulos and Kuck, 1987).
"""

from __future__ import annotations

from typing import Final

LEAST: Final = 500
"""Fewer events are not worth a commit of their own."""

FIRST_SHARE: Final = 8
"""The first batch is so small a part of the largest."""


class Sizes:
    """Of one run. `most`: what a batch may hold; `is_even`: each gets that much, since nothing runs beside a commit."""

    def __init__(self, most: int, *, is_even: bool = False) -> None:
        self._most = most
        self._least = most if is_even else min(most, LEAST)
        self._size = max(self._least, most // FIRST_SHARE)

    def size(self, left: int | None) -> int:
        """Of the next batch. `left`: how many events there are still, None when that is not known."""
        return self._size if left is None else min(self._size, max(self._least, (left + 1) // 2))

    def grow(self) -> None:
        """A batch was taken."""
        self._size = min(2 * self._size, self._most)
