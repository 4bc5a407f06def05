"""Items of a map that are taken where its caller is, while the map runs on the event loop of the app.

An iterable may use what belongs to its thread or its event loop (a cursor, a socket, another blocking call), and may
block. So a map of another thread takes its items in that thread, and a map of another event loop on that loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sized
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, Final

from headrace.runtime.background_loop import CHECK_S, submit_to

GROUP_ITEMS: Final = 256
GROUP_S: Final = 0.001


def take_group(iterator: Iterator[Any]) -> list[Any]:
    """Take the next items: as many as arrive within a millisecond, so that a slow source does not delay its items."""
    until = perf_counter() + GROUP_S
    group: list[Any] = []
    for item in iterator:
        group.append(item)
        if len(group) >= GROUP_ITEMS or perf_counter() > until:
            break
    return group


class ThreadItems:
    """Items that the calling thread takes from an iterable while it waits for its map; see `serve`."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items
        self._iterator = iter(items)
        self._thread_id = threading.get_ident()
        self._requests: SimpleQueue[asyncio.Future[list[Any]] | None] = SimpleQueue()

    async def groups(self) -> AsyncIterator[list[Any]]:
        """Iterate over groups of items, on the event loop of the map."""
        loop = asyncio.get_running_loop()
        while True:
            if threading.get_ident() == self._thread_id:  # the loop runs in the calling thread
                group = take_group(self._iterator)
                await asyncio.sleep(0)
            else:
                request: asyncio.Future[list[Any]] = loop.create_future()
                self._requests.put(request)
                group = await request
            if not group:
                return
            yield group

    def serve(self, answer: Future[Any], loop: asyncio.AbstractEventLoop) -> None:
        """Take items as the map on `loop` requests them, in the calling thread, until the map's `answer` is there."""
        answer.add_done_callback(lambda _: self._requests.put(None))
        while True:
            try:
                request = self._requests.get(timeout=CHECK_S)
            except Empty:
                if not loop.is_running():
                    return
                continue
            if request is None:
                return
            try:
                group, error = take_group(self._iterator), None
            except Exception as failure:  # noqa: BLE001 - the map raises it
                group, error = [], failure
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(_answer, request, group, error)


def _answer(request: asyncio.Future[list[Any]], group: list[Any], error: Exception | None) -> None:
    if request.done():
        return
    if error is None:
        request.set_result(group)
    else:
        request.set_exception(error)


class LoopItems:
    """Items that are taken on the event loop of the caller, which differs from the loop of the map."""

    def __init__(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:
        self.items = items
        self._loop = asyncio.get_running_loop()

    async def groups(self) -> AsyncIterator[list[Any]]:
        """Iterate over groups of items, on the event loop of the map."""
        items = self.items
        iterator: Any = aiter(items) if isinstance(items, AsyncIterable) else iter(items)

        async def advance() -> list[Any]:
            if not isinstance(items, AsyncIterable):
                return take_group(iterator)
            try:
                return [await anext(iterator)]
            except StopAsyncIteration:
                return []

        while group := await asyncio.wrap_future(submit_to(self._loop, advance())):
            yield group


CallerItems = ThreadItems | LoopItems


def items_count(items: object) -> int | None:
    """Return how many items there are; None if only the last one will tell."""
    source = items.items if isinstance(items, CallerItems) else items
    return len(source) if isinstance(source, Sized) else None
