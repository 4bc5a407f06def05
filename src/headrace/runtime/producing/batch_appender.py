"""The batch appender: it appends a stream of runs to a batch, one append at a time.

Runs that arrive during an append share the next one. The waiting runs are bounded, and so is the time for which a
partly filled chunk waits for more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Self

import msgspec

from headrace.core.block import Chunk, Coalescer
from headrace.foundation.errors import ClientFault
from headrace.foundation.limits import MIB
from headrace.runtime.engine import Engine
from headrace.runtime.retrying import retry_transient
from headrace.store.protocol import Appended

WAITING_BYTES_MAX: Final = 8 * MIB
WAITING_CHUNKS_MAX: Final = 64
LINGER_S: Final = 0.002
"""Time for which a partly filled chunk waits for more runs right after a commit; without a commit before it waits for
nothing.
"""

WAITS_MAX: Final = 6
"""Retries before the feed gets the error: about three seconds."""

_NAMES: Final = {"bytes_count": "bytes", "items_count": "items", "lines_count": "lines", "is_open": "open"}


class InputPosition(msgspec.Struct, frozen=True, kw_only=True, rename=_NAMES):
    """A position in an input, after a complete line.

    `digest` is the hash of all bytes before it. `is_open`: the last line had no newline yet when it was read, so any
    further byte but white space would change that line.
    """

    bytes_count: int = 0
    items_count: int = 0
    lines_count: int = 0
    digest: bytes = b""
    is_open: bool = False

    def encode(self) -> bytes:
        """Encode the position as the batch stores it."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, cursor: bytes) -> Self:
        """Decode a stored position; the beginning for a batch that stores none."""
        return msgspec.msgpack.decode(cursor, type=cls) if cursor else cls()


BEGINNING: Final = InputPosition()


async def append_chunks(
    engine: Engine, batch_id: str, chunks: Sequence[Chunk], *, cursor: bytes | None = None, seals: bool = False
) -> Appended:
    """Append chunks in one transaction, and wake the workers that wait for runs."""
    appended = await engine.store.append(batch_id, chunks, now_us=engine.clock.now_us(), cursor=cursor, seals=seals)
    engine.wakeup.notify()
    return appended


class BatchAppender:
    """Appends the runs of its coalescer. Owned by one task, which must call `finish` or `stop`.

    `on_appended` is called after each append. `on_refused` may replace an error of the caller by a more precise one.
    `waits_max`: retries of an append before the error is raised; None retries without end. `gather_s`: how long a
    partly filled chunk waits after a commit, for sources whose runs arrive in waves.
    """

    def __init__(
        self,
        engine: Engine,
        batch_id: str,
        *,
        start: InputPosition = BEGINNING,
        on_appended: Callable[[Appended], None] = lambda _appended: None,
        on_refused: Callable[[ClientFault], Awaitable[ClientFault]] | None = None,
        waits_max: int | None = WAITS_MAX,
        gather_s: float = 0.0,
    ) -> None:
        limits = engine.limits
        self.coalescer = Coalescer(runs_max=limits.chunk_runs_max, bytes_max=limits.chunk_bytes_max)
        self.position = start
        self._engine = engine
        self._clock = engine.clock
        self._batch_id = batch_id
        self._on_appended = on_appended
        self._on_refused = on_refused
        self._waits_max = waits_max
        self._next_item = start.items_count
        self._marks: deque[InputPosition] = deque()
        self._waiting: list[Chunk] = []
        self._waiting_bytes = 0
        self._is_ending = False
        self._gather_s = gather_s
        self._seals = False
        self._full = asyncio.Event()
        self._wake = asyncio.Event()
        self._has_capacity = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="feed append")
        self._task.add_done_callback(lambda _: self._has_capacity.set())

    async def push(self, next_item: int, mark: InputPosition | None) -> None:
        """Announce runs that were added to the coalescer; waits while too many runs wait to be appended."""
        self._next_item = next_item
        if mark is not None:
            self._marks.append(mark)
        self._collect(self.coalescer.take())
        if self._waiting or self.coalescer.open_count:
            self._wake.set()
        while self._waiting_bytes > WAITING_BYTES_MAX or len(self._waiting) > WAITING_CHUNKS_MAX:
            self._has_capacity.clear()
            self._check()
            await self._has_capacity.wait()
        self._check()

    def cut(self) -> None:
        """Close the open chunk, because the next run may have an index that the chunk already holds."""
        self._collect(self.coalescer.flush())

    async def finish(self, *, seals: bool = False) -> None:
        """Append everything, with the last position. `seals`: the last append seals the batch if that makes it
        complete.
        """
        self._is_ending, self._seals = True, seals
        self._wake.set()
        self._full.set()
        await self._task

    async def stop(self) -> None:
        """Cancel the task. An append in flight may still be committed, which is safe to repeat."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        if not self._task.cancelled():
            self._task.exception()  # retrieved: it was raised by `push`, or the feed failed before

    def _check(self) -> None:
        if self._task.done():
            self._task.result()

    def _collect(self, chunks: list[Chunk]) -> None:
        self._waiting += chunks
        if chunks:
            self._full.set()
        self._waiting_bytes += sum(len(chunk.items) for chunk in chunks)

    async def _run(self) -> None:
        is_fresh = False  # True right after a commit, when a source that was blocked may be about to continue
        while True:
            if not self._waiting and not self._is_ending:
                self._wake.clear()
                if not self.coalescer.open_count:
                    is_fresh = False
                    await self._wake.wait()
                    continue
                if is_fresh and self._gather_s:
                    self._full.clear()
                    await self._clock.wait_for(self._full, self._gather_s)
                elif is_fresh and await self._clock.wait_for(self._wake, LINGER_S):
                    is_fresh = False
                    continue
            if not self._waiting or self._is_ending:
                self._collect(self.coalescer.flush())
            await self._append()
            is_fresh = True
            if self._is_ending and not self._waiting and not self.coalescer.open_count:
                return

    async def _append(self) -> None:
        chunks, self._waiting, self._waiting_bytes = self._waiting, [], 0
        durable_items = self._next_item - self.coalescer.open_count
        position = self.position
        while self._marks and self._marks[0].items_count <= durable_items:
            position = self._marks.popleft()
        self._has_capacity.set()
        if not chunks and position.bytes_count == self.position.bytes_count:
            return
        cursor = position.encode() if position.bytes_count > self.position.bytes_count else None
        try:
            appended = await retry_transient(
                lambda: append_chunks(self._engine, self._batch_id, chunks, cursor=cursor, seals=self._seals),
                self._clock,
                what="the store",
                waits_max=self._waits_max,
                outage=self._engine.outage,
            )
        except ClientFault as error:
            if self._on_refused is None:
                raise
            raise await self._on_refused(error) from error
        self._on_appended(appended)
        self.position = position
