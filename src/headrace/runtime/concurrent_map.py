"""A bounded, concurrent map over a stream that may never fit into memory.

Rule 1: the source is pulled lazily, whatever it offers and however slow the consumer is. At most `concurrency` steps
run. In order, what is finished and not yet handed on counts as running; else at most as many results wait beside them,
so that a step ends and the next begins without a word from the consumer.
Rule 2: the first error ends everything: what runs is cancelled, the source is closed, the error goes out
as it is. So does a consumer that stops.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator, Iterable
from typing import Any, Final, Generic, TypeVar, cast, overload

from headrace.foundation.limits import TABLE, check

T = TypeVar("T")
R = TypeVar("R")

_NOTHING: Final = object()


@overload
def map_concurrently(
    source: AsyncIterable[T] | Iterable[T],
    step: Callable[[T], Awaitable[R]],
    *,
    concurrency: int,
    ordered: bool = True,
) -> AsyncGenerator[R, None]: ...


@overload
def map_concurrently(
    source: AsyncIterable[T] | Iterable[T],
    step: Callable[[T], R | Awaitable[R]],
    *,
    concurrency: int,
    ordered: bool = True,
) -> AsyncGenerator[R, None]: ...


def map_concurrently(
    source: AsyncIterable[T] | Iterable[T],
    step: Callable[[T], R | Awaitable[R]],
    *,
    concurrency: int,
    ordered: bool = True,
) -> AsyncGenerator[R, None]:
    """The results of `step` for each item of `source`, with at most `concurrency` steps running.

    `ordered`: results come in the order of the source, and one that is finished early keeps its place;
    else as they finish. A step that returns a plain value costs no task, one that returns an awaitable
    costs one; with a concurrency of 1 none does, and an item is pulled only when the consumer comes back
    for the next result.

    When a step or the source fails, results that come before the failure and are finished are still
    handed on, nothing is waited for, and the error is raised. Close the generator (`aclose`, or
    `contextlib.aclosing`) when leaving early. A plain iterable is read on the loop, so its `next` should
    not block.

    Raises `InvalidSetting` at once for a concurrency that is not a whole number within its limit.
    """
    check(TABLE["ingest_concurrency"], concurrency)
    if concurrency == 1:
        return _one_by_one(source, step)
    return _in_order(source, step, concurrency) if ordered else _as_they_finish(source, step, concurrency)


async def _one_by_one(
    source: AsyncIterable[T] | Iterable[T], step: Callable[[T], R | Awaitable[R]]
) -> AsyncGenerator[R, None]:
    stream = _PulledSource(source)
    try:
        while (item := await stream.pull()) is not _NOTHING:
            result = step(cast("T", item))
            yield await result if isinstance(result, Awaitable) else result
    except BaseException as error:
        await stream.close(error)
        raise
    await stream.close(None)


async def _in_order(
    source: AsyncIterable[T] | Iterable[T], step: Callable[[T], R | Awaitable[R]], concurrency: int
) -> AsyncGenerator[R, None]:
    window = _OrderedWindow(_PulledSource(source), step, concurrency)
    window.start()
    try:
        while (slot := await window.next_finished()) is not None:
            yield cast("R", slot.result)
            window.free_one()
    except BaseException as error:
        await window.stop(error)
        raise
    await window.stop(None)


async def _as_they_finish(
    source: AsyncIterable[T] | Iterable[T], step: Callable[[T], R | Awaitable[R]], concurrency: int
) -> AsyncGenerator[R, None]:
    crew = _UnorderedRunners(_PulledSource(source), step, concurrency)
    crew.start()
    try:
        while await crew.has_result():
            yield crew.take()
    except BaseException as error:
        await crew.stop(error)
        raise
    await crew.stop(None)


class _PulledSource(Generic[T]):
    """One face for plain and asynchronous sources."""

    def __init__(self, source: AsyncIterable[T] | Iterable[T]) -> None:
        self._async = aiter(source) if isinstance(source, AsyncIterable) else None
        self._plain = None if isinstance(source, AsyncIterable) else iter(source)

    async def pull(self) -> T | object:
        """The next item, or `_NOTHING` at the end."""
        if self._async is not None:
            return await anext(self._async, _NOTHING)
        assert self._plain is not None
        return next(self._plain, _NOTHING)

    async def close(self, error: BaseException | None) -> None:
        """Let the source end what it began; if that fails too, `error` stays the error that goes out.

        Files and other iterators that are not generators belong to who opened them.
        """
        try:
            close_async: Any = getattr(self._async, "aclose", None)
            if close_async is not None:
                await close_async()
            elif isinstance(self._plain, Generator):
                self._plain.close()
        except Exception as closing:
            if error is None or isinstance(error, GeneratorExit):
                raise
            error.add_note(f"closing the source failed as well: {closing!r}")


class _Slot:
    """The place of one item in the order of results."""

    __slots__ = ("is_finished", "result")

    def __init__(self) -> None:
        self.is_finished = False
        self.result: object = None


class _UnorderedRunners(Generic[T, R]):
    """Runners that pull, step and hand on, each by itself: one that is done with a step begins the next at once.

    There is one at first; as long as all of them wait for their steps there come as many again, up to `concurrency`.
    """

    def __init__(self, stream: _PulledSource[T], step: Callable[[T], R | Awaitable[R]], concurrency: int) -> None:
        self._stream = stream
        self._step = step
        self._concurrency = concurrency
        self._runners: set[asyncio.Task[None]] = set()
        self._began_count = 0
        self._stepping_count = 0
        self._results: deque[R] = deque()
        self._turn = asyncio.Lock()
        self._is_exhausted = False
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    def start(self) -> None:
        self._grow(1)

    async def has_result(self) -> bool:
        """Wait for a result; False at the end. Raises the first error after what was finished before it."""
        while not self._results:
            if self._error is not None:
                raise self._error
            if not self._runners:
                return False
            self._news.clear()
            await self._news.wait()
        return True

    def take(self) -> R:
        """The result that finished first."""
        self._room.set()
        return self._results.popleft()

    async def stop(self, error: BaseException | None) -> None:
        """End every task this began, and wait for its end, before the source is closed."""
        for runner in self._runners:
            runner.cancel()
        if self._runners:
            await asyncio.wait(self._runners)
        await self._stream.close(error)

    def _grow(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(min(count, self._concurrency - self._began_count)):
            self._began_count += 1
            runner = loop.create_task(self._run(), name="ingest")
            self._runners.add(runner)
            runner.add_done_callback(self._note)

    async def _run(self) -> None:
        while True:
            async with self._turn:  # a source is pulled by one at a time
                while len(self._results) >= self._concurrency:
                    self._room.clear()
                    await self._room.wait()
                item = _NOTHING if self._is_exhausted else await self._stream.pull()
                if item is _NOTHING:
                    self._is_exhausted = True
                    return
                result = self._step(cast("T", item))
                del item
            if isinstance(result, Awaitable):
                self._stepping_count += 1
                if self._stepping_count == self._began_count:
                    self._grow(self._began_count)
                result = await result
                self._stepping_count -= 1
            self._results.append(result)
            self._news.set()

    def _note(self, runner: asyncio.Task[None]) -> None:
        """A runner has ended: nothing is left for it, or it failed; the first error stops the others."""
        self._runners.discard(runner)
        self._news.set()
        error = asyncio.CancelledError() if runner.cancelled() else runner.exception()
        if error is None or self._error is not None:
            return
        self._error = error
        for other in self._runners:
            other.cancel()


class _OrderedWindow(Generic[T, R]):
    """What is pulled and not yet handed on. One task pulls; steps that wait have a task each."""

    def __init__(self, stream: _PulledSource[T], step: Callable[[T], R | Awaitable[R]], concurrency: int) -> None:
        self._stream = stream
        self._step = step
        self._free = concurrency
        self._slots: deque[_Slot] = deque()
        self._running: set[asyncio.Future[R]] = set()
        self._puller: asyncio.Task[None] | None = None
        self._is_exhausted = False
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    def start(self) -> None:
        self._puller = asyncio.get_running_loop().create_task(self._pull(), name="ingest")
        self._puller.add_done_callback(self._note_end)

    async def next_finished(self) -> _Slot | None:
        """The next result, None at the end; raises the first error after what is finished before it."""
        while True:
            if self._slots and self._slots[0].is_finished:
                return self._slots.popleft()
            if self._error is not None:
                raise self._error
            if self._is_exhausted and not self._running and not self._slots:
                return None
            self._news.clear()
            await self._news.wait()

    def free_one(self) -> None:
        """The consumer is done with one result: another item may be pulled."""
        self._free += 1
        self._room.set()

    async def stop(self, error: BaseException | None) -> None:
        """End every task this began, and wait for its end, before the source is closed."""
        tasks: list[asyncio.Future[Any]] = [*self._running]
        if self._puller is not None:
            tasks.append(self._puller)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._stream.close(error)

    async def _pull(self) -> None:
        while True:
            while not self._free:
                self._room.clear()
                await self._room.wait()
            item = await self._stream.pull()
            if item is _NOTHING:
                return
            self._free -= 1
            self._begin(cast("T", item))

    def _begin(self, item: T) -> None:
        slot = _Slot()
        result = self._step(item)
        self._slots.append(slot)
        if not isinstance(result, Awaitable):
            self._finish(slot, result)
            return
        running: asyncio.Future[R] = asyncio.ensure_future(result)
        self._running.add(running)
        running.add_done_callback(lambda done: self._note(slot, done))

    def _finish(self, slot: _Slot, result: object) -> None:
        slot.result = result
        slot.is_finished = True
        self._news.set()

    def _note(self, slot: _Slot, done: asyncio.Future[R]) -> None:
        self._running.discard(done)
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            self._finish(slot, done.result())
        else:
            self._fail(error)

    def _note_end(self, done: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            self._is_exhausted = True
            self._news.set()
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep the first error and stop what would only do more; what that raises says nothing new."""
        if self._error is not None:
            return
        self._error = error
        self._news.set()
        if self._puller is not None:
            self._puller.cancel()
        for task in self._running:
            task.cancel()
