"""The slot of a run: its place among the runs that compute at the same time, at most `concurrency` of them.

A run that waits for other runs gives its slot back, and takes one again before it goes on. So parents that wait never
keep their children from running.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol


class RunSlot(Protocol):
    """The slot of the run whose code is running. A run may have several waits at a time; it has no slot until the last
    of them has ended.
    """

    def give_back(self) -> int | None:
        """Give the slot back for a wait. Return the number of the run, or None if the run keeps its slot."""
        ...

    async def take_again(self, run_no: int) -> None:
        """End a wait. After the last one, wait until a slot is free and take it."""
        ...

    def take_at_once(self, run_no: int) -> None:
        """End a wait whose run is being interrupted, without waiting for a slot."""
        ...


CURRENT_SLOT: ContextVar[RunSlot | None] = ContextVar("headrace_current_slot", default=None)
