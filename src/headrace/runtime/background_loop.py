"""An event loop in a thread, for code that is not async."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeVar

from headrace.foundation.errors import InvalidSetting, StoreUnavailable

T = TypeVar("T")

CHECK_S: Final = 1.0
"""Seconds after which a thread that waits for an event loop checks that the loop still runs."""


class _Pauses(threading.local):
    """The calling thread's context of waiting; an executor that runs one function at a time sets its own."""

    paused: Callable[[], AbstractContextManager[None]] = nullcontext


pauses: Final = _Pauses()

Beside = Callable[[Future[Any], asyncio.AbstractEventLoop], None]
"""Work of the calling thread while it waits for an answer from a loop."""


def run_on(loop: asyncio.AbstractEventLoop, awaitable: Awaitable[T], *, beside: Beside | None = None) -> T:
    """Run an awaitable on a loop of another thread and return its result. Meanwhile the calling thread does the work
    `beside`, if there is any.

    Raises `StoreUnavailable` if the loop ends before.
    """
    future = submit_to(loop, awaitable)
    try:
        if beside is not None:
            beside(future, loop)
        with pauses.paused():
            while not wait_for([future], CHECK_S).done and loop.is_running():
                pass
        if future.done():
            return future.result()
    except CancelledError:
        pass
    except BaseException:
        future.cancel()  # Ctrl-C in the calling thread cancels it on the loop too
        raise
    raise loop_ended()


def submit_to(loop: asyncio.AbstractEventLoop, awaitable: Awaitable[T]) -> Future[T]:
    """Start an awaitable on a loop of another thread. Raises `StoreUnavailable` if the loop is closed."""

    async def wrapped() -> T:
        return await awaitable

    coroutine = wrapped()
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:
        coroutine.close()
        close_unused(awaitable)
        raise loop_ended() from None


def close_unused(awaitable: Any) -> None:
    """Close a coroutine that will never be awaited."""
    if asyncio.iscoroutine(awaitable):
        awaitable.close()


def loop_ended() -> StoreUnavailable:
    """Make the error of a call whose event loop ended before its answer."""
    return StoreUnavailable(
        "the event loop on which the app is open ended during the call", hint="close the app after its last call"
    )


class BackgroundLoop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self.loop.run_forever, name="headrace-loop", daemon=True)
        self._thread.start()

    @property
    def thread_id(self) -> int:
        """The id of its thread."""
        return self._thread.ident or 0

    def run(self, awaitable: Awaitable[T]) -> T:
        """Run an awaitable on the loop and return its result. Call it from any other thread.

        Raises `InvalidSetting` in a forked child process, where the thread does not exist.
        """
        if os.getpid() != self._pid:
            close_unused(awaitable)
            raise InvalidSetting(
                f"this object belongs to process {self._pid}; process {os.getpid()} was forked from it",
                hint="make it in each process, after the fork",
            )
        return run_on(self.loop, awaitable)

    def stop(self) -> None:
        """Cancel what still runs on the loop, close the loop and end the thread."""

        async def end() -> None:
            running_tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in running_tasks:
                task.cancel()
            await asyncio.gather(*running_tasks, return_exceptions=True)
            await self.loop.shutdown_asyncgens()
            await self.loop.shutdown_default_executor()

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
