"""Many small updates, few writes: a bounded buffer that one task empties into the store.

Rule 1: an update that was taken in is in exactly one place: waiting, in the flush in flight, landed, or
refused and reported. A failed write moves nothing.
Rule 2: the buffer is bounded, the flush in flight counts towards it, and a full buffer makes its
producers wait.
Rule 3: everything here runs on one event loop; taking an update in is an append, without a task or a future.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import structlog

from headrace.foundation.errors import EngineFault, HeadraceError, InvalidSetting
from headrace.foundation.limits import HOUR_MS, TABLE, Limit, check
from headrace.runtime.clock import SECOND_US, Clock

T = TypeVar("T")

LOG: Any = structlog.get_logger("headrace.flusher")
_BUFFER_MAX: Final = Limit(
    "buffer_max",
    "updates",
    1_000,
    1,
    100_000_000,
    "Updates taken in and not yet written; then producers wait.",
)
_BACKOFF_INITIAL: Final = Limit(
    "backoff_initial_ms", "ms", 50, 1, HOUR_MS, "Wait after the first failed flush; doubles from there."
)
_BACKOFF_MAX: Final = Limit(
    "backoff_max_ms", "ms", 5_000, 1, HOUR_MS, "Longest wait between two tries of a failing flush."
)


class FlusherClosed(EngineFault):
    """An update was offered after the last flush had been announced; it was not taken in."""

    code = "FLUSHER_CLOSED"
    retryable = False


class UpdatesUnflushed(EngineFault):
    """A flusher stopped before everything it had taken in was written. `unflushed` holds the rest, in order.

    A flush that was in flight when the grace ended is among the rest, though the store may have taken it:
    what is written again from here must be safe to repeat.
    """

    code = "UPDATES_UNFLUSHED"
    retryable = False

    def __init__(self, message: str, unflushed: Sequence[object], *, hint: str = "", **ids: object) -> None:
        super().__init__(message, hint=hint, **ids)
        self.unflushed = tuple(unflushed)


class Flusher(Generic[T]):
    """Takes updates in one by one and writes them in order, at most `size` at a time, one flush at a time.

    A flush is due when `size` updates wait or the oldest has waited `interval_ms`, whichever is first.
    With `interval_ms=None` batching is *natural*: a flush is due whenever none is in flight, so a lone
    update waits for nothing, and what arrives during one flush shares the next.

    `flush` writes all of what it is given or nothing, and is told so by how it ends:

    - it returns: the updates have landed;
    - it raises a `HeadraceError` that can't be retried: the store refuses something in there for good.
      The flush is halved until the one refused update stands alone and goes to `on_refused`; the others
      land, in order;
    - it raises anything else, or is cancelled by its own doing: the same flush, unchanged, is tried again
      after a wait that doubles. The very same updates, since a repeat is what a store with fences
      recognises.

    An unknown exception counts as passing: to drop an update because of a bug would lose it, to wait is
    seen in `last_error` and in the log.
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
    ) -> None:
        """`buffer_max`: two flushes' worth by default, one in flight and one that fills."""
        self.name = name
        self._write = flush
        self._clock = clock
        self._on_refused = on_refused
        self._size = check(TABLE["flush_size"], size)
        self._interval_us = None if interval_ms is None else check(TABLE["flush_interval_ms"], interval_ms) * 1_000
        self._buffer_max = check(_BUFFER_MAX, 2 * size if buffer_max is None else buffer_max)
        self._backoff_initial_ms = check(_BACKOFF_INITIAL, backoff_initial_ms)
        self._backoff_max_ms = check(_BACKOFF_MAX, backoff_max_ms)
        if self._buffer_max < size:
            raise InvalidSetting(
                f"buffer_max ({buffer_max}) is less than one flush, flush_size ({size})",
                hint="set buffer_max to twice flush_size",
            )

        self._waiting: deque[T] = deque()
        self._oldest_us = 0  # the oldest waiting update came no earlier than this
        self._parts: deque[tuple[T, ...]] = deque()  # the flush in flight, in halves once something was refused
        self._held_count = 0  # places taken by `_parts` and by senders let in that have not run yet
        self._granted_count = 0
        self._senders: deque[asyncio.Future[None]] = deque()

        self._failures_count = 0
        self._last_error: BaseException | None = None
        self._flushes_count = 0
        self._flushed_count = 0

        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ended = asyncio.Event()
        self._is_closing = False
        self._has_given_up = False

    # -- what is seen from outside

    @property
    def depth(self) -> int:
        """Updates taken in and not yet written; never more than `buffer_max`."""
        return len(self._waiting) + sum(map(len, self._parts))

    @property
    def flushes_count(self) -> int:
        """Flushes that landed."""
        return self._flushes_count

    @property
    def flushed_count(self) -> int:
        """Updates that landed; those refused are not among them."""
        return self._flushed_count

    @property
    def last_error(self) -> BaseException | None:
        """Why the flush in flight is being tried again; None when the last try landed."""
        return self._last_error

    @property
    def unflushed(self) -> tuple[T, ...]:
        """What was taken in and has not landed, oldest first."""
        return (*(update for part in self._parts for update in part), *self._waiting)

    # -- taking updates in

    def put_nowait(self, update: T) -> bool:
        """Take `update` in and say True, or say False when there is no room or others wait for it already.

        Raises `FlusherClosed` once `close` was called.
        """
        if self._is_closing:
            raise self._closed()
        if len(self._waiting) + self._held_count >= self._buffer_max:
            return False
        self._take_in(update)
        return True

    async def put(self, update: T) -> None:
        """Take `update` in, waiting for room in turn. When this is cancelled, the update was not taken in.

        Raises `FlusherClosed` when `close` was called before; whoever was waiting by then is still let
        in, unless the flusher had to give up.
        """
        if self.put_nowait(update):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._senders.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:
                self._granted_count -= 1
                self._held_count -= 1
                self._let_in()
            elif turn in self._senders:
                self._senders.remove(turn)
            self._wake.set()
            raise
        self._granted_count -= 1
        self._held_count -= 1
        self._take_in(update)

    def _take_in(self, update: T) -> None:
        if self._task is None:
            self._start()
        self._waiting.append(update)
        count = len(self._waiting)
        if count == 1:
            self._oldest_us = self._clock.now_us()
            self._wake.set()
        elif count == self._size:
            self._wake.set()

    def _let_in(self) -> None:
        """Give the room there is to those who wait for it, in the order they came.

        A place that was given is held, so while anyone waits there is no room, and `put_nowait` can't
        overtake.
        """
        room = self._buffer_max - len(self._waiting) - self._held_count
        while room > 0 and self._senders:
            turn = self._senders.popleft()
            if not turn.done():
                turn.set_result(None)
                self._granted_count += 1
                self._held_count += 1
                room -= 1

    # -- the one task

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"flusher {self.name}")
        self._task.add_done_callback(self._end)

    async def _run(self) -> None:
        while await self._is_due():
            self._pick_up()
            while self._parts and not self._has_given_up:
                await self._land(self._parts[0])

    async def _is_due(self) -> bool:
        """True when a flush is due; False when there is nothing to come any more."""
        while not self._has_given_up:
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

    def _pick_up(self) -> None:
        """Move the oldest updates, `size` at most, into the flush in flight.

        What is left keeps the stamp of those who go: it came no earlier, so its own interval is kept; the
        worst that happens is one flush a little early under a backlog. A stamp for each update would cost
        every put.
        """
        waiting = self._waiting
        count = min(self._size, len(waiting))
        part = tuple(waiting.popleft() for _ in range(count))
        self._held_count += count
        self._parts.append(part)

    async def _land(self, part: tuple[T, ...]) -> None:
        """One try to write `part`, the oldest of the flush in flight, and what follows from how it ended."""
        error = await self._try(part)
        if error is None:
            self._flushes_count += 1
            self._flushed_count += len(part)
            self._let_go(part)
        elif not isinstance(error, HeadraceError) or error.retryable:
            await self._back_off(part, error)
        elif len(part) == 1:
            self._let_go(part)
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

    def _let_go(self, part: tuple[T, ...]) -> None:
        self._parts.popleft()
        self._held_count -= len(part)
        self._failures_count = 0
        self._last_error = None
        self._let_in()

    async def _back_off(self, part: tuple[T, ...], error: BaseException) -> None:
        self._last_error = error
        delay_ms = min(self._backoff_max_ms, self._backoff_initial_ms << min(self._failures_count, 32))
        self._failures_count += 1
        LOG.warning(
            "flush failed, will try again",
            flusher=self.name,
            updates=len(part),
            failures=self._failures_count,
            delay_ms=delay_ms,
            error=repr(error),
        )
        if await self._clock.wait_for(self._hurry, delay_ms / 1_000):
            self._hurry.clear()
            self._failures_count = 0

    def _report(self, update: T, error: HeadraceError) -> None:
        try:
            self._on_refused(update, error)
        except Exception:
            LOG.exception("a refused update could not be reported", flusher=self.name, refused=repr(error))

    # -- the end

    async def close(self, *, deadline_s: float | None = None) -> None:
        """Take nothing new, let in who already waits, write everything at once, and end.

        Waits neither for an interval nor for the rest of a back-off. Without a deadline it tries for as
        long as the store fails. After `deadline_s` the flush in flight is cancelled, senders still
        waiting get `FlusherClosed`, and `UpdatesUnflushed` says how many updates stayed and holds them.
        May be called twice, before the first update, and from several tasks at once.
        """
        if not self._is_closing:
            self._is_closing = True
            self._wake.set()
            self._hurry.set()
        if self._task is None:
            self._ended.set()
        elif not await self._clock.wait_for(self._ended, deadline_s):
            self._has_given_up = True
            self._task.cancel()
            await self._ended.wait()
        left = self.unflushed
        if left:
            raise UpdatesUnflushed(
                f"{len(left)} updates stayed unwritten when the flusher ended",
                left,
                hint="they are in `unflushed`: write them again once the store answers",
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
        """Whatever ended the task, nobody waits for it any longer."""
        self._is_closing = True
        self._ended.set()
        while self._senders:
            turn = self._senders.popleft()
            if not turn.done():
                turn.set_exception(self._closed())
        if not task.cancelled() and (error := task.exception()) is not None:
            self._last_error = error
            LOG.error("a flusher broke", flusher=self.name, exc_info=error)

    def _closed(self) -> FlusherClosed:
        return FlusherClosed(
            "the flusher takes no more updates", hint="offer updates before it is closed", flusher=self.name
        )
