"""What a source is: ordered events with positions that it can go on after."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, TypeAlias

from headrace.core.sequencer import Arrived, Position, Rewind

Arrival: TypeAlias = Arrived | Rewind


class Source(Protocol):
    """Ordered events. One that is asked twice to go on after the same position says the same, or `Rewind`."""

    def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """The events after a position, from the beginning for None; ends when no more will ever come."""
        ...

    async def head(self) -> Position | None:
        """The newest position there is, for progress; None when nobody can say."""
        ...
