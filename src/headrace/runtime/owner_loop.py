"""The event loop that an app belongs to, and the ways to it from threads, from other event loops and after a fork.

Connections, wake-ups and sessions belong to one event loop. The first loop on which an app is used becomes its owner; a
thread without a loop starts a background loop for it. Calls from anywhere else are run on the owner.

A forked child process has none of its parent's threads, and must not use its connections: there the app begins anew.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.runtime.background_loop import (
    CHECK_S,
    BackgroundLoop,
    Beside,
    close_unused,
    loop_ended,
    run_on,
    submit_to,
)

T = TypeVar("T")

_OWNERS: WeakSet[OwnerLoop] = WeakSet()
_LEFT_TO_PARENT: list[object] = []
"""Objects that a forked child inherited. They are kept: their finalizers would act on the parent's connections."""


class OwnerLoop:
    """The event loop of one app. `is_open`: True while the app has an engine. `on_forked`: called in a forked child;
    it returns the objects that belong to the parent.
    """

    def __init__(self, *, is_open: Callable[[], bool], on_forked: Callable[[], object]) -> None:
        self._is_open = is_open
        self._on_forked = on_forked
        self._reset()
        _OWNERS.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0
        self._background: BackgroundLoop | None = None
        self._calls_count = 0

    def claim(self) -> bool:
        """Return True if the running loop is the owner; it becomes the owner if there is none that could be used."""
        running = asyncio.get_running_loop()
        if self._loop is running:
            return True
        with self._lock:
            if self._is_free():
                self._loop, self._thread_id = running, threading.get_ident()
            return self._loop is running

    def release(self) -> None:
        """Have no owner until the next call: the app was closed."""
        self._loop = None

    def _is_free(self) -> bool:
        loop = self._loop
        if loop is None or loop.is_closed():
            return True
        if self._is_open():
            return False
        is_idle_background = self._background is not None and self._background.loop is loop and not self._calls_count
        return is_idle_background or not loop.is_running()

    def run(self, awaitable: Awaitable[T], *, beside: Beside | None = None) -> T:
        """Run an awaitable on the owner, from a thread without a running loop, and return its result. Meanwhile the
        thread does the work `beside`, if there is any.

        Raises `InvalidInput` in the owner's own thread, `InvalidSetting` if the owner stands still, and
        `StoreUnavailable` if it ends during the call.
        """
        with self._lock:
            if self._is_free():
                if self._background is None:
                    self._background = BackgroundLoop()
                self._loop, self._thread_id = self._background.loop, self._background.thread_id
            loop = self._loop
            self._calls_count += 1
        assert loop is not None
        try:
            if self._thread_id == threading.get_ident():
                return self._run_here(loop, awaitable)
            if not loop.is_running():
                close_unused(awaitable)
                raise _stands_still()
            return run_on(loop, awaitable, beside=beside)
        finally:
            with self._lock:
                self._calls_count -= 1

    def _run_here(self, loop: asyncio.AbstractEventLoop, awaitable: Awaitable[T]) -> T:
        """Run an awaitable in the thread of the owner, which stands still between two runs of its `Runner`."""
        if loop.is_running():
            close_unused(awaitable)
            raise InvalidInput(
                "a blocking call in the thread of the app's event loop would wait for itself",
                hint="await the call without _sync, or call it in another thread: await asyncio.to_thread(…)",
            )

        async def wrapped() -> T:
            return await awaitable

        return loop.run_until_complete(wrapped())

    async def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine that `make` returns on the owner, from another running loop, and return its result.

        Raises `InvalidSetting` if the owner stands still, and `StoreUnavailable` if it ends during the call.
        """
        loop = self._loop
        if loop is None or not loop.is_running():
            raise _stands_still()
        answer = asyncio.wrap_future(submit_to(loop, make()))
        try:
            while not (await asyncio.wait((answer,), timeout=CHECK_S))[0]:
                if not loop.is_running():
                    raise loop_ended()
        finally:
            answer.cancel()
        return answer.result()

    @property
    def has_background(self) -> bool:
        """True if there is a background loop, and the calling thread is another."""
        return self._background is not None and self._background.thread_id != threading.get_ident()

    def stop_background(self) -> None:
        """End the background loop and its thread, if there is one. Call it from another thread."""
        with self._lock:
            background = self._background
            if background is None or background.thread_id == threading.get_ident():
                return
            self._background = None
            if self._loop is background.loop:
                self._loop = None
        background.stop()

    def begin_anew(self) -> None:
        """Forget the parent's loops and connections, in a forked child."""
        _LEFT_TO_PARENT.append((self._loop, self._background, self._on_forked()))
        self._reset()


def _stands_still() -> InvalidSetting:
    return InvalidSetting(
        "the app is open on an event loop that is not running",
        hint="close it before that loop stops (async with app: …, or await app.close()), or make one Headrace(…) for "
        "each event loop",
    )


def _forked() -> None:
    for owner in list(_OWNERS):
        owner.begin_anew()


with suppress(AttributeError):  # a platform without fork
    os.register_at_fork(after_in_child=_forked)
