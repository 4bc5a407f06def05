"""The fetch loop of an indexer: a task for each source, which waits when enough of its events wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import NamedTuple

from headrace.core.sequencer import Arrived, Position, Rewind, Sequencer
from headrace.foundation.errors import HeadraceError, InvalidInput
from headrace.runtime.indexing.sources.source import Source


class SourceRewind(NamedTuple):
    """A source goes back to a position."""

    source: int
    to: Position | None


class SourceReader:
    """The sources of one running indexer. `news` is called when there is something to look at."""

    def __init__(self, sources: Mapping[str, Source], *, waiting_max: int, news: Callable[[], None]) -> None:
        self.names = list(sources)
        self._sources = list(sources.values())
        self._waiting_max = waiting_max
        self._news = news
        self._tasks: list[asyncio.Task[None] | None] = [None] * len(self.names)
        self._room = asyncio.Event()
        self._turned = asyncio.Event()
        self.sequencer = Sequencer(self.names, [None] * len(self.names))
        self.turn: SourceRewind | None = None
        self.failure: BaseException | None = None

    async def start(self, positions: Mapping[str, Position], *, but: int | None = None) -> None:
        """Read every source on from its position; `but` goes on by itself, being the one that went back."""
        for number, task in enumerate(self._tasks):
            if task is not None and number != but:
                await _ended(task)
        after = [positions.get(name) for name in self.names]
        closed = [
            number for number, task in enumerate(self._tasks) if number == but and task is not None and task.done()
        ]
        self.sequencer = Sequencer(self.names, after)
        for number in closed:
            self.sequencer.close(number)
        for number, position in enumerate(after):
            if number != but:
                self._tasks[number] = asyncio.ensure_future(self._read(number, position))

    def took(self) -> None:
        """Events were taken: there is room for more."""
        self._room.set()

    def turned(self) -> None:
        """The turn was followed: its source may go on."""
        self.turn = None
        self._turned.set()

    async def close(self) -> None:
        """Read no more."""
        for task in self._tasks:
            if task is not None:
                await _ended(task)

    async def heads(self) -> dict[str, Position]:
        """The newest position of each source that can say."""
        found = {}
        for name, source in zip(self.names, self._sources, strict=True):
            head = await source.head()
            if head is not None:
                found[name] = head
        return found

    async def _read(self, number: int, after: Position | None) -> None:
        try:
            async with aclosing(self._sources[number].arrivals(after)) as arrivals:  # type: ignore[type-var]  # every async generator has aclose
                async for arrival in arrivals:
                    if isinstance(arrival, Rewind):
                        await self._turn(SourceRewind(number, arrival.to))
                    else:
                        await self._feed(number, arrival)
            self.sequencer.close(number)
        except asyncio.CancelledError:
            raise
        except HeadraceError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001 - a source is anybody's code
            self.failure = _broken(self.names[number], error)
        self._news()

    async def _feed(self, number: int, arrived: Arrived) -> None:
        while not self.sequencer.wants(number, self._waiting_max):
            self._room.clear()
            await self._room.wait()
        self.sequencer.feed(number, arrived)
        self._news()

    async def _turn(self, turn: SourceRewind) -> None:
        while self.turn is not None:  # another source's is followed first
            self._turned.clear()
            await self._turned.wait()
        self.turn = turn
        self._turned.clear()
        self._news()
        while self.turn is turn:
            await self._turned.wait()


def _broken(name: str, error: Exception) -> InvalidInput:
    found = InvalidInput(f"the source {name!r} failed: {type(error).__name__}: {error}", source=name)
    found.__cause__ = error
    return found


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
