"""Taking in items that say themselves at which index they belong: bytes in, durable runs out.

Rule 1: order comes from the index, so items pass the object store side by side and arrive in any order. At most
`ingest_concurrency` of them are under way at once; the source is not read meanwhile.
Rule 2: what was read before a stream broke, or before an item that is refused, becomes durable all the same. Who sends
it again adds nothing twice.
Rule 3: an item over the bound becomes a run that failed, at its own index. One at an index that the batch does not have
is refused, and nothing of it stays.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import msgspec

from headrace.core.batch import Batch
from headrace.core.block import Extra
from headrace.core.failure import Failure
from headrace.core.ndjson import Item, NdjsonMachine, Oversized, Unreadable
from headrace.core.pack import JSON, REFERENCE
from headrace.core.span import Key
from headrace.foundation.errors import ClientFault, HeadraceError, InvalidInput, ObjectMissing
from headrace.runtime.concurrent_map import map_concurrently
from headrace.runtime.engine import Engine
from headrace.runtime.producing.batch_appender import BatchAppender
from headrace.runtime.producing.sequential_feed import failed_item
from headrace.runtime.retrying import retry_transient
from headrace.store.protocol import Appended

SLICE_BYTES: Final = 128 * 1024
"""Decoded without letting go of the loop: some milliseconds of small items."""

WAITS_MAX: Final = 9
"""About nineteen seconds for a store that is away, then whoever sends is told to come again."""

GATHER_S: Final = 0.01
"""The waves of a concurrent map end some milliseconds apart: they share a commit."""

_BORN_FAILED: Final = b"{}"


class UnreadableItem(InvalidInput):
    """A line is not JSON, or not UTF-8: which index it was can't be known."""

    code = "UNREADABLE_ITEM"


class IndexOutside(InvalidInput):
    """An item's index is one that the batch does not have."""

    code = "INDEX_OUTSIDE"
    status = 422


class IndexedItem(NamedTuple):
    """One item, ready to be stored. Of kind REFERENCE its payload is what the client calls an uploaded one."""

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
    """Makes entries of lines, and knows what was uploaded before."""

    def one(self, line: bytes) -> IndexedItem:
        """The item that a line is. Raises `InvalidInput`."""

    def many(self, lines: Sequence[bytes]) -> EntryGroup | None:
        """Many lines in a few calls, when all of them are good; None: each is judged alone, by `one`."""

    def key_of(self, task: str) -> Key:
        """How runs of a task are kept when an item says no more."""

    def fetched(self, name: bytes, /) -> Awaitable[tuple[bytes, int]]:
        """An uploaded payload and its kind. Raises `InvalidInput`, `ObjectMissing`, `StoreUnavailable`."""


@dataclass(slots=True)
class FeedCounts:
    """What a stream brought, as far as it is durable. `sealed`: the batch, when the last of it closed it."""

    accepted_count: int = 0
    duplicates_count: int = 0
    conflicts: list[int] = field(default_factory=list)
    sealed: Batch | None = None

    def add(self, appended: Appended) -> None:
        """Count one append."""
        self.accepted_count += appended.accepted_count
        self.duplicates_count += appended.duplicates_count
        self.conflicts += appended.conflicts
        self.sealed = appended.sealed or self.sealed


class IndexedFeed:
    """One stream of items into one batch."""

    def __init__(self, engine: Engine, batch: Batch, decoder: ItemDecoder) -> None:
        self.taken = FeedCounts()
        self._engine = engine
        self._batch = batch
        self._decoder = decoder
        self._bound = engine.limits.batch_runs_max if batch.expected_count is None else batch.expected_count

    async def run(
        self, pieces: AsyncIterable[bytes], *, meter: Callable[[int], None] = lambda _count: None
    ) -> FeedCounts:
        """Read to the end; a batch that is whole then is closed with it.

        `meter` hears of bytes as they are read. Raises what the source raises, `UnreadableItem`, `InvalidInput`,
        `StoreUnavailable`.
        """
        limits = self._engine.limits
        appender = BatchAppender(
            self._engine, self._batch.id, on_appended=self.taken.add, waits_max=WAITS_MAX, gather_s=GATHER_S
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
            with suppress(HeadraceError):  # rule 2; the first error says why
                await appender.finish()
            raise
        finally:
            await appender.stop()
        return self.taken

    # -- reading

    async def _groups(self, pieces: AsyncIterable[bytes], meter: Callable[[int], None]) -> AsyncIterator[EntryGroup]:
        machine = NdjsonMachine(item_bytes_max=self._engine.limits.item_bytes_max)
        async for piece in pieces:
            meter(len(piece))
            for start in range(0, len(piece), SLICE_BYTES):
                for group in self._cut(machine.feed(piece[start : start + SLICE_BYTES])):
                    yield group
        for group in self._cut(machine.close()):
            yield group

    def _cut(self, items: list[Item]) -> Iterator[EntryGroup]:
        """Items in groups: one that goes to the object store is alone. A line that is refused comes last."""
        lines: list[bytes] = []
        refused: HeadraceError | None = None
        entries: list[IndexedItem | ItemRange] = []
        for item in items:
            if type(item) is bytes:
                lines.append(item)
            elif isinstance(item, Oversized):
                entries.append(self._failed(item))
            elif isinstance(item, Unreadable):
                refused = UnreadableItem(item.reason, hint="send the lines that are left once it is mended")
                break
        items.clear()  # a large line is held once, by its entry
        try:
            for entry in self._decoded(lines):
                if self._is_small((entry,)):
                    entries.append(entry)
                    continue
                if entries:
                    yield entries
                    entries = []
                yield (entry,)
        except HeadraceError as error:
            refused = error
        if entries:
            yield entries
        if refused is not None:
            raise refused

    def _decoded(self, lines: list[bytes]) -> Iterator[IndexedItem | ItemRange]:
        """Lines as entries, many at once where all of them are good; one that is to be offloaded by itself."""
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
            yield self._decoder.one(lines.pop())

    def _is_small(self, group: EntryGroup) -> bool:
        most = self._engine.limits.inline_bytes_max
        return all(
            (entry.kind != REFERENCE and len(entry.payload) < most)
            if isinstance(entry, IndexedItem)
            else max(map(len, entry.payloads)) < most
            for entry in group
        )

    def _failed(self, item: Oversized) -> IndexedItem:
        return IndexedItem(item.index, self._decoder.key_of(item.task), _BORN_FAILED, JSON, failed_item(item))

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
                    hint="indexes run from 0 to the announced count less one",
                    batch_id=self._batch.id,
                )
        if not self._is_small(group):
            (only,) = group
            assert isinstance(only, IndexedItem)
            return self._fetched(only) if only.kind == REFERENCE else self._offloaded(only)
        return group

    async def _fetched(self, entry: IndexedItem) -> EntryGroup:
        """An item whose payload was uploaded before: it becomes this batch's own, or the run fails for want of it."""
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
        own = entry._replace(payload=payload, kind=kind)
        return (own,) if self._is_small((own,)) else await self._offloaded(own)

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
        """Put an entry into the open chunk, which holds no index twice; answers how many runs it is."""
        if isinstance(entry, ItemRange):
            if appender.coalescer.holds(entry.first_index, len(entry.payloads)):
                appender.cut()
            appender.coalescer.extend(entry.first_index, entry.payloads, entry.key)
            return len(entry.payloads)
        if appender.coalescer.holds(entry.run_index, 1):
            appender.cut()
        appender.coalescer.add(entry.run_index, entry.payload, entry.key, kind=entry.kind, extra=entry.extra)
        return 1
