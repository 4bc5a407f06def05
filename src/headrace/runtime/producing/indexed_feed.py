"""The indexed feed: items that carry their own index in the batch become durable runs.

Rule 1: the order comes from the index, so items may pass the object store concurrently and arrive in any order. At most
`ingest_concurrency` of them are in flight; the source is not read meanwhile. Rule 2: items that were read before a
stream broke, or before an item that is refused, become durable all the same. Sending them again adds nothing twice.
Rule 3: an item over the size bound becomes a failed run, at its own index. An item at an index that the batch does not
have is refused, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import msgspec

from headrace.core.batch import BatchRecord
from headrace.core.block import Extra
from headrace.core.failure import Failure
from headrace.core.ndjson import UNKNOWN_TASK, Item, NdjsonMachine, Oversized, Unreadable
from headrace.core.pack import JSON, REFERENCE, TEXT
from headrace.core.span import Key
from headrace.foundation.errors import ClientFault, HeadraceError, InvalidInput, ObjectMissing
from headrace.runtime.concurrent_map import map_concurrently
from headrace.runtime.engine import Engine
from headrace.runtime.producing.batch_appender import BatchAppender
from headrace.runtime.producing.sequential_feed import failed_item
from headrace.runtime.retrying import retry_transient
from headrace.store.protocol import Appended

SLICE_BYTES: Final = 128 * 1024
"""Bytes decoded before yielding to the event loop: some milliseconds of small items."""

WAITS_MAX: Final = 9
"""Retries while a store is unreachable, about sixteen seconds; then the client is asked to retry later."""

GATHER_S: Final = 0.01
"""The steps of a concurrent map end some milliseconds apart and share a commit."""

_BORN_FAILED: Final = b"{}"


class UnreadableItem(InvalidInput):
    """A line is not JSON, or not UTF-8, so its index is unknown."""

    code = "UNREADABLE_ITEM"


class IndexOutside(InvalidInput):
    """The index of an item is not in the batch."""

    code = "INDEX_OUTSIDE"
    status = 422


class IndexedItem(NamedTuple):
    """One item, ready to be stored. If its kind is REFERENCE, the payload is the name of an uploaded payload."""

    run_index: int
    key: Key
    payload: bytes
    kind: int = JSON
    extra: Extra | None = None


class ItemRange(NamedTuple):
    """Many items of one key with JSON payloads and consecutive indexes."""

    first_index: int
    key: Key
    payloads: Sequence[bytes]


EntryGroup = Sequence["IndexedItem | ItemRange"]


class ItemDecoder(Protocol):
    """Decodes lines into items, and finds payloads that were uploaded before."""

    def decode_line(self, line: bytes) -> IndexedItem:
        """Decode one line. Raises `InvalidInput`."""

    def many(self, lines: Sequence[bytes]) -> EntryGroup | None:
        """Decode many lines in a few calls; None if one of them is invalid, so that each is decoded alone by `one`."""

    def key_of(self, task: str) -> Key:
        """Return the key of a run of a task whose item has no options."""

    def fetched(self, name: bytes, /) -> Awaitable[tuple[bytes, int]]:
        """Return an uploaded payload and its kind. Raises `InvalidInput`, `ObjectMissing`, `StoreUnavailable`."""


@dataclass(slots=True)
class FeedCounts:
    """Counts of a stream, as far as it is durable. `sealed`: the batch, if the last append sealed it."""

    accepted_count: int = 0
    duplicates_count: int = 0
    conflicts: list[int] = field(default_factory=list)
    sealed: BatchRecord | None = None

    def add(self, appended: Appended) -> None:
        """Add the counts of one append."""
        self.accepted_count += appended.accepted_count
        self.duplicates_count += appended.duplicates_count
        self.conflicts += appended.conflicts
        self.sealed = appended.sealed or self.sealed


class _Place(NamedTuple):
    """Bytes fed at once, their offset in the stream, and the number of lines that ended before them."""

    data: bytes
    offset: int
    lines_before: int

    def line_of(self, end: int) -> int:
        """Return the number of the line that ends at an offset of the stream, from 1; blank lines count too."""
        size = end - self.offset
        newlines_count = self.data.count(b"\n", 0, size)
        return self.lines_before + max(newlines_count, 1)


def _at_line(error: ClientFault, line: int) -> ClientFault:
    """Return the error of an item with the number of its line."""
    return type(error)(f"Line {line}: {error.message}", hint=error.hint, **{**error.ids, "line": line})


class IndexedFeed:
    """One stream of items into one batch."""

    def __init__(self, engine: Engine, batch: BatchRecord, decoder: ItemDecoder) -> None:
        self.counts = FeedCounts()
        self._engine = engine
        self._batch = batch
        self._decoder = decoder
        self._bound = engine.limits.batch_runs_max if batch.expected_count is None else batch.expected_count

    async def run(
        self, pieces: AsyncIterable[bytes], *, meter: Callable[[int], None] = lambda _count: None
    ) -> FeedCounts:
        """Read the stream to its end; a batch that is complete then is sealed with the last append.

        `meter` gets the size of each piece as it is read. Raises what the source raises, and `UnreadableItem`,
        `InvalidInput`, `StoreUnavailable`.
        """
        limits = self._engine.limits
        appender = BatchAppender(
            self._engine, self._batch.id, on_appended=self.counts.add, waits_max=WAITS_MAX, gather_s=GATHER_S
        )
        groups = map_concurrently(
            self._groups(pieces, meter), self._settled, concurrency=limits.ingest_concurrency, ordered=False
        )
        count = 0
        try:
            async with aclosing(groups):
                async for group in groups:
                    for entry in group:
                        count += self._add(appender, entry)
                    await appender.push(count, None)
            await appender.finish(seals=True)
        except BaseException:
            with suppress(HeadraceError):  # rule 2; the first error is raised
                await appender.finish()
            raise
        finally:
            await appender.stop()
        return self.counts

    # -- reading

    async def _groups(self, pieces: AsyncIterable[bytes], meter: Callable[[int], None]) -> AsyncIterator[EntryGroup]:
        machine = NdjsonMachine(item_bytes_max=self._engine.limits.item_bytes_max)
        fed_bytes = 0
        async for piece in pieces:
            meter(len(piece))
            for start in range(0, len(piece), SLICE_BYTES):
                part = piece[start : start + SLICE_BYTES]
                place = _Place(part, fed_bytes, machine.line_no)
                fed_bytes += len(part)
                for group in self._cut(machine.feed(part), machine, place):
                    yield group
        place = _Place(b"", fed_bytes, machine.line_no)
        for group in self._cut(machine.close(), machine, place):
            yield group

    def _cut(self, items: list[Item], machine: NdjsonMachine, place: _Place) -> Iterator[EntryGroup]:
        """Yield items in groups: one that goes to the object store is alone. A line that is refused comes last."""
        lines: list[bytes] = []
        oversized: list[int] = []
        refused: HeadraceError | None = None
        entries: list[IndexedItem | ItemRange] = []
        for item in items:
            if type(item) is bytes:
                lines.append(item)
            elif isinstance(item, Oversized):
                oversized.append(len(lines))
                entries.append(self._failed(item))
            elif isinstance(item, Unreadable):
                refused = UnreadableItem(item.reason, hint="correct the line and send the remaining lines")
                break
        items.clear()  # so that a large line is held once, by its item
        lines_count = len(lines)
        try:
            for entry in self._decoded(lines):
                if self._is_small((entry,)):
                    entries.append(entry)
                    continue
                if entries:
                    yield entries
                    entries = []
                yield (entry,)
        except ClientFault as error:
            number = lines_count - len(lines) - 1  # -1 if the lines were not decoded one by one
            position = number + sum(before <= number for before in oversized)
            refused = error if number < 0 else _at_line(error, place.line_of(machine.last_ends[position]))
        except HeadraceError as error:
            refused = error
        if entries:
            yield entries
        if refused is not None:
            raise refused

    def _decoded(self, lines: list[bytes]) -> Iterator[IndexedItem | ItemRange]:
        """Decode lines, many at once if all of them are valid; an item that is to be offloaded is yielded by itself."""
        group = self._decoder.many(lines) if lines else ()
        if group is not None:
            lines.clear()
            for entry in group:
                if isinstance(entry, IndexedItem) or self._is_small((entry,)):
                    yield entry
                else:
                    yield from (
                        IndexedItem(index, entry.key, payload)
                        for index, payload in enumerate(entry.payloads, entry.first_index)
                    )
            return
        lines.reverse()
        while lines:
            yield self._decoder.decode_line(lines.pop())

    def _is_small(self, group: EntryGroup) -> bool:
        most = self._engine.limits.inline_bytes_max
        return all(
            (entry.kind != REFERENCE and len(entry.payload) < most)
            if isinstance(entry, IndexedItem)
            else max(map(len, entry.payloads)) < most
            for entry in group
        )

    def _failed(self, item: Oversized) -> IndexedItem:
        task = self._batch.task if item.task == UNKNOWN_TASK and self._batch.task else item.task
        return IndexedItem(item.index, self._decoder.key_of(task), item.raw, TEXT, failed_item(item))

    # -- the object store

    def _settled(self, group: EntryGroup) -> EntryGroup | Awaitable[EntryGroup]:
        for entry in group:
            first, last = (
                (entry.run_index, entry.run_index)
                if isinstance(entry, IndexedItem)
                else (entry.first_index, entry.first_index + len(entry.payloads) - 1)
            )
            if last >= self._bound:
                index = max(first, self._bound)
                raise IndexOutside(
                    f"Item index {index} exceeds batch runCount {self._bound}",
                    hint="indexes run from 0 to the announced count minus one",
                    batch_id=self._batch.id,
                )
        if not self._is_small(group):
            (only,) = group
            assert isinstance(only, IndexedItem)
            return self._fetched(only) if only.kind == REFERENCE else self._offloaded(only)
        return group

    async def _fetched(self, entry: IndexedItem) -> EntryGroup:
        """Take over an uploaded payload into this batch; if it is missing, the run is created as failed."""
        try:
            payload, kind = await retry_transient(
                lambda: self._decoder.fetched(entry.payload),
                self._engine.clock,
                what="the object store",
                waits_max=WAITS_MAX,
            )
        except (ClientFault, ObjectMissing) as error:
            failure = Failure(type=error.code, message=error.message).encode()
            extra = msgspec.structs.replace(entry.extra or Extra(), failure=failure, idempotency_key="")
            return (entry._replace(payload=_BORN_FAILED, kind=JSON, extra=extra),)
        resolved = entry._replace(payload=payload, kind=kind)
        return (resolved,) if self._is_small((resolved,)) else await self._offloaded(resolved)

    async def _offloaded(self, entry: IndexedItem) -> EntryGroup:
        engine, batch_id = self._engine, self._batch.id
        reference, object_key = await retry_transient(
            lambda: engine.offloaded(batch_id, entry.payload, entry.kind),
            engine.clock,
            what="the object store",
            waits_max=WAITS_MAX,
        )
        extra = msgspec.structs.replace(entry.extra or Extra(), object_key=object_key, object_bytes=len(entry.payload))
        return (entry._replace(payload=reference, kind=REFERENCE, extra=extra),)

    # -- appending

    def _add(self, appender: BatchAppender, entry: IndexedItem | ItemRange) -> int:
        """Add an item to the open chunk, which holds no index twice; return the number of its runs."""
        if isinstance(entry, ItemRange):
            if appender.coalescer.holds(entry.first_index, len(entry.payloads)):
                appender.cut()
            appender.coalescer.extend(entry.first_index, entry.payloads, entry.key)
            return len(entry.payloads)
        if appender.coalescer.holds(entry.run_index, 1):
            appender.cut()
        appender.coalescer.add(entry.run_index, entry.payload, entry.key, kind=entry.kind, extra=entry.extra)
        return 1
