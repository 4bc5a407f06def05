"""Speculative reads: when a handler misses a row in memory, the handlers of the next events run ahead to state what
they need.

They run all at once, with contexts that write nothing. Their reads join the query that the first handler waits for, so
a batch costs one query per table and turn, not one per event. While everything needed is in memory, no handler runs
ahead. Errors raised there are ignored: the handler raises them again in its turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from types import coroutine
from typing import Any

from headrace.runtime.indexing.handler_context import HandlerContext


class SpeculativeReads:
    """The handlers of one batch that run ahead."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._contexts: list[HandlerContext] = []

    def begin(self, handler: Callable[[Any, Any], Any], event: Any, context: HandlerContext) -> None:
        """Run a handler up to its first wait, and on from there when that has ended."""
        running: Coroutine[Any, Any, Any] = handler(event, context)
        self._contexts.append(context)
        try:
            waits_for = running.send(None)
        except StopIteration:
            return
        except Exception:  # noqa: BLE001 - raised again in the handler's own turn
            return
        task = asyncio.ensure_future(_run_rest(running, waits_for))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Cancel the handlers: the batch has ended."""
        for context in self._contexts:
            context.is_over = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def _run_rest(running: Coroutine[Any, Any, Any], waits_for: Any) -> None:
    with suppress(Exception):
        await _continue(running, waits_for)


@coroutine
def _continue(running: Coroutine[Any, Any, Any], waits_for: Any) -> Generator[Any, Any, Any]:
    """Continue a coroutine that has begun."""
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:  # noqa: BLE001 - thrown on into the handler
            step: Callable[[Any], Any] = running.throw
            value: Any = error
        else:
            step, value = running.send, sent
        try:
            waits_for = step(value)
        except StopIteration as stop:
            return stop.value
