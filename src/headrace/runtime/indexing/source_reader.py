"""The fetch loop of an indexer: one task per source, which waits when enough of its events are buffered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import NamedTuple

from headrace.core.sequencer import Arrived, Position, Rewind, Sequencer
from headrace.foundation.errors import HeadraceError, InvalidInput
from headrace.runtime.indexing.sources.source import Source


class SourceRewind(NamedTuple):
    """The rewind of a source to a position."""

    source: int
    to: Position | None


class SourceReader:
    """Reads the sources of one running indexer. `on_change` is called when events, an end or an error are available."""

    def __init__(self, sources: Mapping[str, Source], *, waiting_max: int, on_change: Callable[[], None]) -> None:
        self.names = list(sources)
        self._sources = list(sources.values())
        self._waiting_max = waiting_max
        self._on_change = on_change
        self._tasks: list[asyncio.Task[None] | None] = [None] * len(self.names)
        self._has_capacity = asyncio.Event()
        self._rewind_done = asyncio.Event()
        self.sequencer = Sequencer(self.names, [None] * len(self.names))
        self.rewind: SourceRewind | None = None
        self.failure: BaseException | None = None

    async def start(self, positions: Mapping[str, Position], *, but: int | None = None) -> None:
        """Read every source from its position on; the task of source `but`, the one that was rewound, is kept."""
        for number, task in enumerate(self._tasks):
            if task is not None and number != but:
                await _cancel(task)
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

    def events_taken(self) -> None:
        """Note that events were taken, so that more can be read."""
        self._has_capacity.set()

    def rewind_followed(self) -> None:
        """Note that the rewind was followed; its source continues."""
        self.rewind = None
        self._rewind_done.set()

    async def close(self) -> None:
        """Stop reading."""
        for task in self._tasks:
            if task is not None:
                await _cancel(task)

    async def heads(self) -> dict[str, Position]:
        """Return the newest position of each source that knows it."""
        positions = {}
        for name, source in zip(self.names, self._sources, strict=True):
            head = await source.head()
            if head is not None:
                positions[name] = head
        return positions

    async def _read(self, number: int, after: Position | None) -> None:
        try:
            async with aclosing(self._sources[number].arrivals(after)) as arrivals:  # type: ignore[type-var]  # every async generator has aclose
                async for arrival in arrivals:
                    if isinstance(arrival, Rewind):
                        await self._request_rewind(SourceRewind(number, arrival.to))
                    else:
                        await self._feed(number, arrival)
            self.sequencer.close(number)
        except asyncio.CancelledError:
            raise
        except HeadraceError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001 - a source is user code
            self.failure = _source_error(self.names[number], error)
        self._on_change()

    async def _feed(self, number: int, arrived: Arrived) -> None:
        while not self.sequencer.wants(number, self._waiting_max):
            self._has_capacity.clear()
            await self._has_capacity.wait()
        self.sequencer.feed(number, arrived)
        self._on_change()

    async def _request_rewind(self, rewind: SourceRewind) -> None:
        while self.rewind is not None:  # the rewind of another source is followed first
            self._rewind_done.clear()
            await self._rewind_done.wait()
        self.rewind = rewind
        self._rewind_done.clear()
        self._on_change()
        while self.rewind is rewind:
            await self._rewind_done.wait()


def _source_error(name: str, error: Exception) -> InvalidInput:
    failure = InvalidInput(f"the source {name!r} failed: {type(error).__name__}: {error}", source=name)
    failure.__cause__ = error
    return failure


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
