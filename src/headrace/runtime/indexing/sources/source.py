"""The interface of sources: ordered events, with positions after which reading can continue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, TypeAlias

from headrace.core.sequencer import Arrived, Position, Rewind

Arrival: TypeAlias = Arrived | Rewind


class Source(Protocol):
    """Ordered events. Reading twice after the same position yields the same events, or `Rewind`."""

    def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the events after a position, from the beginning for None; end when no more events can come."""
        ...

    async def head(self) -> Position | None:
        """Return the newest position, to show progress; None if it is unknown."""
        ...
