"""Events from any iterator, plain or async, and from a finished batch's results."""

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
    """What `begin(after)` iterates over: `(position, event)`, `(position, event, time)`, or `Rewind(to)`.

    It is given the last committed position, None at the very beginning, and gives what follows. A plain iterator is
    drained in pieces; an async one is passed on as it comes.
    """

    def __init__(self, begin: Callable[[Position | None], Any]) -> None:
        self._begin = begin

    async def head(self) -> Position | None:
        """An iterator does not say where it ends."""
        return None

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """What the iterator gives."""
        made = self._begin(after)
        if inspect.isawaitable(made):
            made = await made
        if isinstance(made, AsyncIterable):
            async for entry in made:
                yield _arrival([entry])
            return
        if not isinstance(made, Iterable):
            raise InvalidInput(f"a stream's function answers an iterator, not {type(made).__name__}")
        piece: list[Any] = []
        for entry in made:
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
                f"a stream gives (position, event) or (position, event, time), not {type(entry).__name__}",
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
        """The last index."""
        engine: Engine = await self._open_engine()
        batch, _ = await engine.store.batch(self._batch)
        return batch.received_count - 1

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """The outcomes after an index. Raises `Conflict` while the batch is not finished."""
        engine: Engine = await self._open_engine()
        batch, _ = await engine.store.batch(self._batch)
        if not batch.is_finished:
            raise Conflict(f"the batch is {batch.state}; its results are not all there", batch_id=self._batch)
        index = 0 if after is None else int(after) + 1
        while True:
            outcomes = [
                own for own in await engine.store.outcomes(self._batch, index, PIECE_EVENTS) if own.state in FINAL
            ]
            if not outcomes:
                return
            events = []
            for own in outcomes:
                result, kind = own.result, own.kind
                if kind == REFERENCE:
                    result, kind = await engine.fetch(result)
                output: Any = result.decode() if kind == TEXT else msgspec.json.decode(result) if result else None
                events.append({"type": "result", "index": own.index, "state": NAMES[own.state], "output": output})
            yield Arrived([own.index for own in outcomes], events)
            index = outcomes[-1].index + 1
