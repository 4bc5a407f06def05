"""The sequential feed: it reads an NDJSON input into batches, durably, and resumes where it stopped.

Rule 1: the appended runs and the position in the input are one transaction. The position's digest covers exactly the
bytes before it. A feed that was killed resumes without a guess, and an input that changed in between is detected. Rule
2: a position is at the end of a line, and never ahead of what is durable. Items that are therefore read twice are
recognised by their index and add nothing. Rule 3: one append is in flight at a time; what is read meanwhile shares the
next. The waiting items are bounded, and so is the time for which the event loop is blocked: items are handled in
slices.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Iterable, Iterator
from typing import Final, NamedTuple, TypeVar

from headrace.core.batch import BatchRecord
from headrace.core.block import Extra
from headrace.core.failure import Failure
from headrace.core.ndjson import Item, NdjsonMachine, Oversized, Unreadable
from headrace.core.pack import REFERENCE, TEXT
from headrace.core.span import Key
from headrace.foundation.errors import ClientFault, Conflict, InvalidInput
from headrace.runtime.concurrent_map import map_concurrently
from headrace.runtime.engine import Engine
from headrace.runtime.producing.batch_appender import BEGINNING, WAITS_MAX, BatchAppender, InputPosition
from headrace.runtime.retrying import retry_transient
from headrace.store.protocol import Appended

SLICE_LINES_MAX: Final = 4_096
"""Lines handled before yielding to the event loop: some milliseconds."""

DIGEST_BYTES: Final = 32
T = TypeVar("T")


class SealedElsewhere(Conflict):
    """Another feed sealed the batch at an earlier end of the same input: start again from its cursor."""


class _ItemGroup(NamedTuple):
    """Consecutive items: any number of small ones, or a single one that is to be offloaded."""

    items: list[Item]
    mark: InputPosition | None
    extra: Extra | None = None


class SequentialFeed:
    """One pass over an input, from `start` to its end, into one batch or several consecutive ones.

    `pieces` are the input's bytes from the very first on, in pieces of any size. The bytes before `start` are only
    hashed and compared. `position` is the last position that is known to be durable.
    """

    def __init__(
        self,
        pieces: AsyncIterable[bytes] | Iterable[bytes],
        *,
        engine: Engine,
        key: Key,
        start: InputPosition = BEGINNING,
        waits_max: int | None = WAITS_MAX,
    ) -> None:
        """`waits_max`: retries of an operation of the store before the error is raised; None retries without end."""
        self.position = start
        self._waits_max = waits_max
        self._pieces = pieces
        self._engine = engine
        self._limits = engine.limits
        self._key = key
        self._batch: BatchRecord | None = None
        self._start = start
        self._next_item = start.items_count
        self._cut_at = 0
        self._groups: AsyncGenerator[_ItemGroup, None] | None = None
        self._pending: _ItemGroup | None = None

    async def fill(self, batch: BatchRecord, *, base_index: int = 0) -> bool:
        """Append to `batch` until the input ends, and seal it: True. False: the batch is full (it was sealed already,
        or holds `batch_runs_max`), and more of the input is left for the next one.

        `base_index` is the item of the input that is the batch's run 0. Raises `InvalidInput` for an input that
        changed, `SealedElsewhere` when another feed was faster.
        """
        self._batch = batch
        is_sealed = batch.expected_count is not None
        full_at = base_index + (batch.expected_count or 0 if is_sealed else self._limits.batch_runs_max)
        self._cut_at = self._cut_at or full_at
        appender = BatchAppender(
            self._engine,
            batch.id,
            start=self.position,
            on_appended=self._check_same,
            on_refused=self._refusal,
            waits_max=self._waits_max,
        )
        add, key = appender.coalescer.add, self._key
        try:
            while (group := await self._next_group()) is not None:
                if group.items and self._next_item + len(group.items) > full_at:
                    self._pending = group
                    break
                index = self._next_item - base_index
                if group.extra is not None:
                    (payload,) = group.items
                    assert isinstance(payload, bytes)
                    add(index, payload, key, kind=REFERENCE, extra=group.extra)
                else:
                    for item in group.items:
                        if type(item) is bytes:
                            add(index, item, key)
                        else:
                            assert not isinstance(item, bytes)
                            add(index, item.raw, key, kind=TEXT, extra=failed_item(item))
                        index += 1
                self._next_item += len(group.items)
                await appender.push(self._next_item, group.mark)
            await appender.finish()
        finally:
            self.position = appender.position
            await appender.stop()
        if group is not None and self._next_item < full_at:
            raise _sealed_elsewhere(batch)  # the stored end of a continued batch is not where this feed expected it
        if is_sealed and self._next_item < full_at:
            raise input_changed(f"it has {self._next_item:,} items, expected {full_at:,}")
        if not is_sealed:
            await self._seal(batch, self._next_item - base_index)
        return group is None

    async def close(self) -> None:
        """Stop reading. A feed that is left early must be closed."""
        if self._groups is not None:
            await self._groups.aclose()

    async def _seal(self, batch: BatchRecord, count: int) -> None:
        store, clock = self._engine.store, self._engine.clock
        try:
            await retry_transient(
                lambda: store.seal(batch.id, count, now_us=clock.now_us()),
                clock,
                what="the store",
                waits_max=self._waits_max,
                outage=self._engine.outage,
            )
        except Conflict as error:
            after, _ = await store.batch(batch.id)
            if after.is_stopped:
                raise
            raise _sealed_elsewhere(batch) from error

    def _check_same(self, appended: Appended) -> None:
        if appended.conflicts:
            assert self._batch is not None
            raise input_changed(f"run {appended.conflicts[0]:,} was created from another line", batch_id=self._batch.id)

    async def _refusal(self, error: ClientFault) -> ClientFault:
        """Return the same error, or `SealedElsewhere` if another feed sealed the batch while this feed went on past its
        end.
        """
        assert self._batch is not None
        batch, _ = await self._engine.store.batch(self._batch.id)
        if batch.expected_count != self._batch.expected_count and not batch.is_stopped:
            return _sealed_elsewhere(batch)
        return error

    async def _next_group(self) -> _ItemGroup | None:
        if self._pending is not None:
            group, self._pending = self._pending, None
            return group
        if self._groups is None:
            self._groups = map_concurrently(self._cut(), self._offloaded, concurrency=self._limits.ingest_concurrency)
        return await anext(self._groups, None)

    # -- reading

    async def _cut(self) -> AsyncIterator[_ItemGroup]:
        """Yield the input from `start` on, in groups; the last group of each slice carries the position in the
        input.
        """
        reader = _InputReader(self._pieces)
        try:
            at_bytes = await reader.skip(self._start)
            machine = NdjsonMachine(
                item_bytes_max=self._limits.item_bytes_max,
                bytes_before=at_bytes,
                items_before=self._start.items_count,
                lines_before=self._start.lines_count,
            )
            while (piece := await reader.next()) is not None:
                for portion in self._portions(piece, machine):
                    items = machine.feed(portion)
                    cut = portion.rfind(b"\n") + 1
                    reader.digest.update(memoryview(portion)[:cut])
                    mark = self._mark(machine, at_bytes + cut, reader.digest.digest()) if cut else None
                    reader.digest.update(memoryview(portion)[cut:])
                    at_bytes += len(portion)
                    for group in self._grouped(items, mark):
                        yield group
                    await asyncio.sleep(0)
            if items := machine.close():
                mark = self._mark(machine, at_bytes, reader.digest.digest(), is_open=True)
                for group in self._grouped(items, mark):
                    yield group
        finally:
            await reader.close()

    def _mark(self, machine: NdjsonMachine, at_bytes: int, digest: bytes, *, is_open: bool = False) -> InputPosition:
        return InputPosition(
            bytes_count=at_bytes,
            items_count=machine.items_count,
            lines_count=machine.line_no,
            digest=digest,
            is_open=is_open,
        )

    def _portions(self, piece: bytes, machine: NdjsonMachine) -> Iterator[bytes]:
        """Yield `piece` in slices of some thousand lines; line by line if a batch gets full in it, to stop exactly
        there.
        """
        at = 0
        lines_count = piece.count(b"\n")
        while lines_count and self._cut_at - machine.items_count <= lines_count:
            end = piece.index(b"\n", at) + 1
            yield piece[at:end]
            at, lines_count = end, lines_count - 1
            if machine.items_count == self._cut_at:
                self._cut_at += self._limits.batch_runs_max
        slice_bytes = max(1, (len(piece) - at) * SLICE_LINES_MAX // max(lines_count, SLICE_LINES_MAX))
        for start in range(at, len(piece), slice_bytes):
            yield piece[start : start + slice_bytes]

    def _grouped(self, items: list[Item], mark: InputPosition | None) -> Iterator[_ItemGroup]:
        """Yield items in groups, with each item that is to be offloaded alone. The usual case needs only a few
        calls.
        """
        large_bytes = self._limits.inline_bytes_max
        sizes = [len(item) for item in items if type(item) is bytes]
        if max(sizes, default=0) < large_bytes:
            if items or mark is not None:
                yield _ItemGroup(items, mark)
            return
        small: list[Item] = []
        for item in items:
            if type(item) is bytes and len(item) >= large_bytes:
                if small:
                    yield _ItemGroup(small, None)
                yield _ItemGroup([item], None)
                small = []
            else:
                small.append(item)
        yield _ItemGroup(small, mark)

    def _offloaded(self, group: _ItemGroup) -> _ItemGroup | Awaitable[_ItemGroup]:
        first = group.items[0] if len(group.items) == 1 else None
        if type(first) is bytes and len(first) >= self._limits.inline_bytes_max:
            return self._offload(first, group.mark)
        return group

    async def _offload(self, payload: bytes, mark: InputPosition | None) -> _ItemGroup:
        """Write one large payload to the object store before the row that refers to it."""
        assert self._batch is not None
        engine, batch_id = self._engine, self._batch.id
        reference, key = await retry_transient(
            lambda: engine.offloaded(batch_id, payload),
            engine.clock,
            what="the object store",
            waits_max=WAITS_MAX,
        )
        return _ItemGroup([reference], mark, Extra(object_key=key, object_bytes=len(payload)))


class _InputReader:
    """Reads pieces from a plain or asynchronous iterable, hashes them, and checks the part before the start."""

    def __init__(self, pieces: AsyncIterable[bytes] | Iterable[bytes]) -> None:
        self._async = aiter(pieces) if isinstance(pieces, AsyncIterable) else None
        self._plain = None if isinstance(pieces, AsyncIterable) else iter(pieces)
        self._rest = b""
        self.digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    async def next(self) -> bytes | None:
        if self._rest:
            piece, self._rest = self._rest, b""
            return piece
        if self._async is not None:
            return await anext(self._async, None)
        assert self._plain is not None
        return next(self._plain, None)

    async def skip(self, start: InputPosition) -> int:
        """Skip the bytes before `start` and check that they did not change; return how many bytes were skipped."""
        left = start.bytes_count
        while left:
            piece = await self.next()
            if piece is None:
                raise input_changed(f"it has fewer than the {start.bytes_count:,} bytes that were read before")
            piece, self._rest = piece[:left], piece[left:]
            self.digest.update(piece)
            left -= len(piece)
            await asyncio.sleep(0)
        if start.bytes_count and self.digest.digest() != start.digest:
            raise input_changed(f"its first {start.bytes_count:,} bytes differ from those that were read before")
        return start.bytes_count + (await self._end_line(start) if start.is_open else 0)

    async def _end_line(self, start: InputPosition) -> int:
        """Skip the end of a line that had no newline: only white space may have been added to it."""
        passed_bytes = 0
        while (piece := await self.next()) is not None:
            line, newline, rest = piece.partition(b"\n")
            if line.strip():
                raise input_changed(f"line {start.lines_count}, the last one, had no newline and has been continued")
            self.digest.update(line + newline)
            passed_bytes += len(line) + len(newline)
            if newline:
                self._rest = rest
                break
        return passed_bytes

    async def close(self) -> None:
        close = getattr(self._async, "aclose", None) or getattr(self._plain, "close", None)
        if close is not None:
            result = close()
            if isinstance(result, Awaitable):
                await result


def failed_item(marker: Oversized | Unreadable) -> Extra:
    """Return the extras of a run that is created as failed, because its line is not a valid item."""
    if isinstance(marker, Oversized):
        failure = Failure(
            type="PAYLOAD_TOO_LARGE",
            message=f"line {marker.line}: expected at most {marker.max_bytes:,} bytes (item_bytes_max), "
            f"got {marker.actual_bytes:,}",
        )
    else:
        kind = "InvalidUTF8" if marker.reason.startswith("Invalid UTF-8") else "InvalidJSON"
        failure = Failure(type=kind, message=marker.reason)
    return Extra(failure=failure.encode())


def _sealed_elsewhere(batch: BatchRecord) -> SealedElsewhere:
    return SealedElsewhere("another feed sealed the batch", hint="run the same command again", batch_id=batch.id)


def input_changed(how: str, **ids: object) -> InvalidInput:
    """Return the error for an input that differs from the one that was fed before."""
    return InvalidInput(f"the input changed since it was read: {how}", hint="pass --fresh to start over", **ids)
