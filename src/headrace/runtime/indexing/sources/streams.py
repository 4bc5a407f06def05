"""Events from any iterator, plain or async, and from the results of a finished batch."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any, Final

import msgspec

from headrace.core.pack import REFERENCE, TEXT
from headrace.core.run import FINAL, NAMES
from headrace.core.sequencer import Arrived, Position, Rewind
from headrace.foundation.errors import Conflict, InvalidInput
from headrace.runtime.engine import Engine
from headrace.runtime.indexing.sources.source import Arrival

PIECE_EVENTS: Final = 1_000

Entries = Iterable[Any] | AsyncIterable[Any]


class Stream:
    """The items of `begin(after)`: `(position, event)`, `(position, event, time)`, or `Rewind(to)`.

    `begin` gets the last committed position, None at the very beginning, and returns the events after it. A plain
    iterator is read in pieces, an async one item by item.
    """

    def __init__(self, begin: Callable[[Position | None], Any]) -> None:
        self._begin = begin

    async def head(self) -> Position | None:
        """Return None: the end of an iterator is unknown."""
        return None

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the iterator's events."""
        entries = self._begin(after)
        if inspect.isawaitable(entries):
            entries = await entries
        if isinstance(entries, AsyncIterable):
            async for entry in entries:
                yield _arrival([entry])
            return
        if not isinstance(entries, Iterable):
            raise InvalidInput(f"stream: expected a function that returns an iterator, got {type(entries).__name__}")
        piece: list[Any] = []
        for entry in entries:
            if isinstance(entry, Rewind):
                if piece:
                    yield _arrival(piece)
                    piece = []
                yield entry
                continue
            piece.append(entry)
            if len(piece) >= PIECE_EVENTS:
                yield _arrival(piece)
                piece = []
        if piece:
            yield _arrival(piece)


def _arrival(entries: list[Any]) -> Arrival:
    if len(entries) == 1 and isinstance(entries[0], Rewind):
        return entries[0]
    for entry in entries:
        if not isinstance(entry, tuple) or len(entry) not in (2, 3):
            raise InvalidInput(
                f"stream: expected (position, event) or (position, event, time), got {type(entry).__name__}",
                hint="or Rewind(to)",
            )
    timed = all(len(entry) == 3 for entry in entries)
    times = [entry[2] for entry in entries] if timed else None
    return Arrived([entry[0] for entry in entries], [entry[1] for entry in entries], times)


class Results:
    """The outcomes of a finished batch, `{"type": "result", "index", "state", "output"}`; the position is the index."""

    def __init__(self, open_engine: Callable[[], Any], batch: str) -> None:
        self._open_engine = open_engine
        self._batch = batch

    async def head(self) -> Position | None:
        """Return the last index."""
        engine: Engine = await self._open_engine()
        batch, _ = await engine.store.batch(self._batch)
        return batch.received_count - 1

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the outcomes after an index. Raises `Conflict` if the batch is not finished."""
        engine: Engine = await self._open_engine()
        batch, _ = await engine.store.batch(self._batch)
        if not batch.is_finished:
            raise Conflict(f"expected a finished batch, its state is {batch.state}", batch_id=self._batch)
        index = 0 if after is None else int(after) + 1
        while True:
            outcomes = [
                outcome
                for outcome in await engine.store.outcomes(self._batch, index, PIECE_EVENTS)
                if outcome.state in FINAL
            ]
            if not outcomes:
                return
            events = []
            for outcome in outcomes:
                result, kind = outcome.result, outcome.kind
                if kind == REFERENCE:
                    result, kind = await engine.fetch(result)
                output: Any = result.decode() if kind == TEXT else msgspec.json.decode(result) if result else None
                events.append(
                    {"type": "result", "index": outcome.index, "state": NAMES[outcome.state], "output": output}
                )
            yield Arrived([outcome.index for outcome in outcomes], events)
            index = outcomes[-1].index + 1
