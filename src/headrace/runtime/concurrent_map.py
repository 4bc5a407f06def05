"""A bounded, concurrent map over a stream that may not fit into memory.

Rule 1: the source is pulled lazily, at most as fast as results are consumed. At most `concurrency` steps run. In
ordered mode a finished result that was not yet consumed counts as a running step. In unordered mode at most
`concurrency` results wait beside the running steps, so a step can start without waiting for the consumer. Rule 2: the
first error ends the map: running steps are cancelled, the source is closed, and the error is raised unchanged. A
consumer that stops early has the same effect.
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
    """Yield the results of `step` for each item of `source`, with at most `concurrency` steps running.

    `ordered`: results are yielded in the order of the source; otherwise in the order of completion. A step that returns
    a plain value costs no task, one that returns an awaitable costs one. With a concurrency of 1 there are no tasks,
    and an item is pulled only when the consumer asks for the next result.

    If a step or the source fails, finished results from before the failure are still yielded, then the error is raised
    without waiting for other steps. Close the generator (`aclose`, or `contextlib.aclosing`) when you leave it early.
    A plain iterable is read on the event loop, so its `next` must not block.

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
    runners = _UnorderedRunners(_PulledSource(source), step, concurrency)
    runners.start()
    try:
        while await runners.has_result():
            yield runners.take()
    except BaseException as error:
        await runners.stop(error)
        raise
    await runners.stop(None)


class _PulledSource(Generic[T]):
    """One interface over plain and asynchronous sources."""

    def __init__(self, source: AsyncIterable[T] | Iterable[T]) -> None:
        self._async = aiter(source) if isinstance(source, AsyncIterable) else None
        self._plain = None if isinstance(source, AsyncIterable) else iter(source)

    async def pull(self) -> T | object:
        """Return the next item, or `_NOTHING` at the end."""
        if self._async is not None:
            return await anext(self._async, _NOTHING)
        assert self._plain is not None
        return next(self._plain, _NOTHING)

    async def close(self, error: BaseException | None) -> None:
        """Close a source that is a generator. If that fails too, `error` stays the error that is raised.

        Files and other iterators that are not generators belong to the caller.
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
            error.add_note(f"closing the source failed too: {closing!r}")


class _Slot:
    """The result of one item, at the item's position in the order."""

    __slots__ = ("is_finished", "result")

    def __init__(self) -> None:
        self.is_finished = False
        self.result: object = None


class _UnorderedRunners(Generic[T, R]):
    """Runner tasks that each pull an item, run its step and store the result, in the order of completion.

    One runner starts first. Whenever all runners wait for their steps, their number doubles, up to `concurrency`.
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
        self._changed = asyncio.Event()
        self._has_capacity = asyncio.Event()

    def start(self) -> None:
        self._grow(1)

    async def has_result(self) -> bool:
        """Wait for a result; False at the end. Raises the first error after the results that came before it."""
        while not self._results:
            if self._error is not None:
                raise self._error
            if not self._runners:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    def take(self) -> R:
        """Return the result that finished first."""
        self._has_capacity.set()
        return self._results.popleft()

    async def stop(self, error: BaseException | None) -> None:
        """Cancel the runners, wait until they have ended, then close the source."""
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
            runner.add_done_callback(self._on_end)

    async def _run(self) -> None:
        while True:
            async with self._turn:  # only one runner at a time pulls from the source
                while len(self._results) >= self._concurrency:
                    self._has_capacity.clear()
                    await self._has_capacity.wait()
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
            self._changed.set()

    def _on_end(self, runner: asyncio.Task[None]) -> None:
        """Handle the end of a runner: the source is exhausted, or a step failed; the first error cancels the others."""
        self._runners.discard(runner)
        self._changed.set()
        error = asyncio.CancelledError() if runner.cancelled() else runner.exception()
        if error is None or self._error is not None:
            return
        self._error = error
        for other in self._runners:
            other.cancel()


class _OrderedWindow(Generic[T, R]):
    """The items that were pulled and not yet consumed. One task pulls; each step that waits has a task of its own."""

    def __init__(self, stream: _PulledSource[T], step: Callable[[T], R | Awaitable[R]], concurrency: int) -> None:
        self._stream = stream
        self._step = step
        self._free = concurrency
        self._slots: deque[_Slot] = deque()
        self._running: set[asyncio.Future[R]] = set()
        self._puller: asyncio.Task[None] | None = None
        self._is_exhausted = False
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._has_capacity = asyncio.Event()

    def start(self) -> None:
        self._puller = asyncio.get_running_loop().create_task(self._pull(), name="ingest")
        self._puller.add_done_callback(self._on_puller_end)

    async def next_finished(self) -> _Slot | None:
        """Return the next result in order, None at the end. Raises the first error after the results before it."""
        while True:
            if self._slots and self._slots[0].is_finished:
                return self._slots.popleft()
            if self._error is not None:
                raise self._error
            if self._is_exhausted and not self._running and not self._slots:
                return None
            self._changed.clear()
            await self._changed.wait()

    def free_one(self) -> None:
        """Allow one more item to be pulled: the consumer has finished with a result."""
        self._free += 1
        self._has_capacity.set()

    async def stop(self, error: BaseException | None) -> None:
        """Cancel all tasks, wait until they have ended, then close the source."""
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
                self._has_capacity.clear()
                await self._has_capacity.wait()
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
        running.add_done_callback(lambda done: self._on_end(slot, done))

    def _finish(self, slot: _Slot, result: object) -> None:
        slot.result = result
        slot.is_finished = True
        self._changed.set()

    def _on_end(self, slot: _Slot, done: asyncio.Future[R]) -> None:
        self._running.discard(done)
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            self._finish(slot, done.result())
        else:
            self._fail(error)

    def _on_puller_end(self, done: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            self._is_exhausted = True
            self._changed.set()
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep the first error and cancel the other steps; their errors are consequences of the first."""
        if self._error is not None:
            return
        self._error = error
        self._changed.set()
        if self._puller is not None:
            self._puller.cancel()
        for task in self._running:
            task.cancel()
