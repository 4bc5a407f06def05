"""The flusher: a bounded buffer of small updates that one task writes in few transactions.

Rule 1: an accepted update is in exactly one place: waiting, in the current flush, written, or refused and reported. A
failed write moves nothing. Rule 2: the buffer is bounded and includes the current flush. When it is full, producers
wait. Rule 3: everything runs on one event loop. Accepting an update is an append to a deque, without a task or a
future.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from headrace.foundation.errors import EngineFault, HeadraceError, InvalidSetting
from headrace.foundation.limits import HOUR_MS, TABLE, Limit, check
from headrace.foundation.logs import get_logger
from headrace.runtime.clock import SECOND_US, Clock
from headrace.runtime.outage import Outage

T = TypeVar("T")

LOG: Any = get_logger("headrace.flusher")
_BUFFER_MAX: Final = Limit(
    "buffer_max",
    "updates",
    1_000,
    1,
    100_000_000,
    "Updates accepted and not yet written; producers wait at this bound.",
)
_BACKOFF_INITIAL: Final = Limit(
    "backoff_initial_ms", "ms", 50, 1, HOUR_MS, "Wait after the first failed flush; doubles after each further failure."
)
_BACKOFF_MAX: Final = Limit(
    "backoff_max_ms", "ms", 5_000, 1, HOUR_MS, "Longest wait between two attempts of a failing flush."
)


class FlusherClosed(EngineFault):
    """An update was offered after `close` was called; it was not accepted."""

    code = "FLUSHER_CLOSED"
    retryable = False


class UpdatesUnflushed(EngineFault):
    """A flusher ended before every accepted update was written. `unflushed` holds the rest, in order.

    A flush that was in flight when the grace period ended is part of the rest, although the store may have committed
    it. Writing the rest again must therefore be safe.
    """

    code = "UPDATES_UNFLUSHED"
    retryable = False

    def __init__(self, message: str, unflushed: Sequence[object], *, hint: str = "", **ids: object) -> None:
        super().__init__(message, hint=hint, **ids)
        self.unflushed = tuple(unflushed)


class Flusher(Generic[T]):
    """Accepts updates one by one and writes them in order, at most `size` at a time, one flush at a time.

    A flush is due when `size` updates wait or the oldest has waited `interval_ms`, whichever comes first. With
    `interval_ms=None` batching is *natural*: a flush is due whenever none is in flight. A lone update is written at
    once, and updates that arrive during a flush share the next one.

    `flush` writes all of its updates or none. How it ends decides what follows:

    - it returns: the updates are written;
    - it raises a `HeadraceError` that is not retryable: the store refuses one of the updates. The flush is halved until
      the refused update is alone and is passed to `on_refused`; the others are written, in order;
    - it raises anything else, or is cancelled from inside: the same flush, with the same updates, is retried after a
      wait that doubles. A store with fences recognises the repetition.

    With `outage`, the outages of the store, a flush is retried when the store is back, and not before.

    An unknown exception counts as retryable. Dropping an update because of a bug would lose it; waiting is visible in
    `last_error` and in the log.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[T]], Awaitable[None]],
        *,
        name: str,
        clock: Clock,
        on_refused: Callable[[T, HeadraceError], None],
        size: int = TABLE["flush_size"].default,
        interval_ms: int | None = None,
        buffer_max: int | None = None,
        backoff_initial_ms: int = _BACKOFF_INITIAL.default,
        backoff_max_ms: int = _BACKOFF_MAX.default,
        outage: Outage | None = None,
    ) -> None:
        """`buffer_max` is two flushes by default: one in flight and one that fills."""
        self.name = name
        self._write = flush
        self._clock = clock
        self._on_refused = on_refused
        self._size = check(TABLE["flush_size"], size)
        self._interval_us = None if interval_ms is None else check(TABLE["flush_interval_ms"], interval_ms) * 1_000
        self._buffer_max = check(_BUFFER_MAX, 2 * size if buffer_max is None else buffer_max)
        self._backoff_initial_ms = check(_BACKOFF_INITIAL, backoff_initial_ms)
        self._backoff_max_ms = check(_BACKOFF_MAX, backoff_max_ms)
        self._outage = outage
        if self._buffer_max < size:
            raise InvalidSetting(
                f"buffer_max ({buffer_max}) must be at least one flush, flush_size ({size})",
                hint="set buffer_max to twice flush_size",
            )

        self._waiting: deque[T] = deque()
        self._oldest_us = 0  # no waiting update is older than this
        self._parts: deque[tuple[T, ...]] = deque()  # the current flush, in halves after a refusal
        self._held_count = 0  # capacity used by `_parts`, and by senders that were granted a place and have not run yet
        self._granted_count = 0
        self._senders: deque[asyncio.Future[None]] = deque()

        self._failures_count = 0
        self._last_error: BaseException | None = None
        self._flushes_count = 0
        self._flushed_count = 0

        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._skip_backoff = asyncio.Event()
        self._ended = asyncio.Event()
        self._is_closing = False
        self._is_past_deadline = False

    # -- state

    @property
    def depth(self) -> int:
        """Number of updates accepted and not yet written; at most `buffer_max`."""
        return len(self._waiting) + sum(map(len, self._parts))

    @property
    def flushes_count(self) -> int:
        """Number of flushes that were written."""
        return self._flushes_count

    @property
    def flushed_count(self) -> int:
        """Number of updates that were written, without the refused ones."""
        return self._flushed_count

    @property
    def last_error(self) -> BaseException | None:
        """The error for which the current flush is retried; None if its last attempt succeeded."""
        return self._last_error

    @property
    def unflushed(self) -> tuple[T, ...]:
        """The updates accepted and not yet written, oldest first."""
        return (*(update for part in self._parts for update in part), *self._waiting)

    # -- accepting updates

    def put_nowait(self, update: T) -> bool:
        """Accept `update` and return True; return False if the buffer is full or other senders wait.

        Raises `FlusherClosed` once `close` was called.
        """
        if self._is_closing:
            raise self._closed()
        if len(self._waiting) + self._held_count >= self._buffer_max:
            return False
        self._accept(update)
        return True

    async def put(self, update: T) -> None:
        """Accept `update`, waiting for a place in turn. If the call is cancelled, the update was not accepted.

        Raises `FlusherClosed` if `close` was called before. A sender that waited before `close` is still accepted,
        unless the flusher's grace period ends first.
        """
        if self.put_nowait(update):
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._senders.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled() and place.exception() is None:
                self._granted_count -= 1
                self._held_count -= 1
                self._grant_places()
            elif place in self._senders:
                self._senders.remove(place)
            self._wake.set()
            raise
        self._granted_count -= 1
        self._held_count -= 1
        self._accept(update)

    def _accept(self, update: T) -> None:
        if self._task is None:
            self._start()
        self._waiting.append(update)
        count = len(self._waiting)
        if count == 1:
            self._oldest_us = self._clock.now_us()
            self._wake.set()
        elif count == self._size:
            self._wake.set()

    def _grant_places(self) -> None:
        """Grant free places to the waiting senders, in their order.

        A granted place counts as used, so while senders wait the buffer is full and `put_nowait` can't overtake them.
        """
        free_count = self._buffer_max - len(self._waiting) - self._held_count
        while free_count > 0 and self._senders:
            place = self._senders.popleft()
            if not place.done():
                place.set_result(None)
                self._granted_count += 1
                self._held_count += 1
                free_count -= 1

    # -- the task

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"flusher {self.name}")
        self._task.add_done_callback(self._end)

    async def _run(self) -> None:
        while await self._wait_until_due():
            self._start_flush()
            while self._parts and not self._is_past_deadline:
                await self._write_part(self._parts[0])

    async def _wait_until_due(self) -> bool:
        """True when a flush is due; False when no update can follow."""
        while not self._is_past_deadline:
            self._wake.clear()
            wait_s: float | None = None
            if self._waiting:
                wait_s = self._wait_s()
                if wait_s <= 0:
                    return True
            elif self._is_closing and not self._granted_count:
                return False
            await self._clock.wait_for(self._wake, wait_s)
        return False

    def _wait_s(self) -> float:
        if self._interval_us is None or self._is_closing or len(self._waiting) >= self._size:
            return 0.0
        return (self._oldest_us + self._interval_us - self._clock.now_us()) / SECOND_US

    def _start_flush(self) -> None:
        """Move the oldest updates, at most `size`, into the current flush.

        The remaining updates keep the time stamp of those that leave. They are not older, so their own interval is
        kept; at worst a flush is a little early under a backlog. A time stamp per update would cost every `put`.
        """
        waiting = self._waiting
        count = min(self._size, len(waiting))
        part = tuple(waiting.popleft() for _ in range(count))
        self._held_count += count
        self._parts.append(part)

    async def _write_part(self, part: tuple[T, ...]) -> None:
        """Write `part`, the oldest of the current flush, and handle the result."""
        error = await self._try(part)
        if error is None:
            self._flushes_count += 1
            self._flushed_count += len(part)
            self._finish_part(part)
        elif not isinstance(error, HeadraceError) or error.retryable:
            await self._back_off(part, error)
        elif len(part) == 1:
            self._finish_part(part)
            self._report(part[0], error)
        else:
            middle = len(part) // 2
            self._parts.popleft()
            self._parts.extendleft((part[middle:], part[:middle]))

    async def _try(self, part: tuple[T, ...]) -> BaseException | None:
        try:
            await self._write(part)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return error
        except Exception as error:  # noqa: BLE001 - any of them is a verdict on the flush
            return error
        return None

    def _finish_part(self, part: tuple[T, ...]) -> None:
        self._parts.popleft()
        self._held_count -= len(part)
        self._failures_count = 0
        self._last_error = None
        self._grant_places()

    async def _back_off(self, part: tuple[T, ...], error: BaseException) -> None:
        self._last_error = error
        delay_ms = min(self._backoff_max_ms, self._backoff_initial_ms << min(self._failures_count, 32))
        self._failures_count += 1
        LOG.warning(
            "flush.retrying",
            flusher=self.name,
            updates=len(part),
            failures=self._failures_count,
            delay_ms=delay_ms,
            error=repr(error),
        )
        is_skipped = await self._clock.wait_for(self._skip_backoff, delay_ms / 1_000)
        if not is_skipped and self._outage is not None and not self._outage.is_over:
            await self._outage.until_over(self._clock, event=self._skip_backoff)
        if self._skip_backoff.is_set():
            self._skip_backoff.clear()
            self._failures_count = 0

    def _report(self, update: T, error: HeadraceError) -> None:
        try:
            self._on_refused(update, error)
        except Exception:
            LOG.exception("flush.refusal_callback_failed", flusher=self.name, refused=repr(error))

    # -- closing

    async def close(self, *, deadline_s: float | None = None) -> None:
        """Accept no new update, accept those of waiting senders, write everything at once, and end.

        Waits neither for an interval nor for the rest of a back-off. Without a deadline it retries as long as the store
        fails. After `deadline_s` the current flush is cancelled, senders that still wait get `FlusherClosed`, and
        `UpdatesUnflushed` is raised with the remaining updates. May be called twice, before the first update, and from
        several tasks at once.
        """
        if not self._is_closing:
            self._is_closing = True
            self._wake.set()
            self._skip_backoff.set()
        if self._task is None:
            self._ended.set()
        elif not await self._clock.wait_for(self._ended, deadline_s):
            self._is_past_deadline = True
            self._task.cancel()
            await self._ended.wait()
        unflushed = self.unflushed
        if unflushed:
            raise UpdatesUnflushed(
                f"{len(unflushed)} updates were not written before the flusher ended",
                unflushed,
                hint="write the updates in `unflushed` again once the store is reachable",
                flusher=self.name,
                last_error=self._last_error,
            ) from self._last_error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _end(self, task: asyncio.Task[None]) -> None:
        """Release every waiting sender and closer, for any end of the task."""
        self._is_closing = True
        self._ended.set()
        while self._senders:
            place = self._senders.popleft()
            if not place.done():
                place.set_exception(self._closed())
        if not task.cancelled() and (error := task.exception()) is not None:
            self._last_error = error
            LOG.error("flusher.failed", flusher=self.name, exc_info=error)

    def _closed(self) -> FlusherClosed:
        return FlusherClosed(
            "the flusher is closed and accepts no update", hint="offer updates before close", flusher=self.name
        )
