"""Notifications between the processes on one store, and their kinds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol

WORK: Final = "work"
"""The notification that work was appended, became due or was released."""
RECORDED: Final = "recorded"
"""The notification that outcomes were recorded, or that the state of a batch changed without one."""
CANCELLED: Final = "cancelled"
"""The notification that runs were cancelled which a session may have leased."""


class Notifier(Protocol):
    """Notifications between the processes on one store: sent after a commit, coalesced, and never waited for.

    Delivery is best effort: a notification may be late, doubled or lost, so a waiting process also polls the store.
    Every method is called on the event loop that waits.
    """

    def listen(self, kind: str, notify_local: Callable[[], None]) -> None:
        """Call `notify_local` when another process sent the notification `kind`, or may have."""

    def notify(self, kind: str) -> None:
        """Send a notification to the other processes, soon."""

    def awaited(self) -> AbstractContextManager[object]:
        """Receive notifications while the block lasts."""

    async def close(self) -> None:
        """Send pending notifications if that is quick, then disconnect. A second close does nothing."""
