"""Async methods that work on every event loop, and their blocking twins for code that is not async.

    class Headrace:
        @on_owner_loop
        async def get_run(self, run_id: str) -> Run[Any]: ...

        get_run_sync = blocking(get_run)

A twin takes the same arguments, has the same types and raises the same errors. The calling thread waits while the
method runs on the event loop that the app belongs to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from headrace.foundation.errors import InvalidInput
from headrace.runtime.owner_loop import OwnerLoop

P = ParamSpec("P")
T = TypeVar("T")


class Owned(Protocol):
    """An object whose async methods run on the event loop of its app."""

    @property
    def _owner(self) -> OwnerLoop:
        """The event loop of the app."""
        ...


S = TypeVar("S", bound=Owned)


def on_owner_loop(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Run an async method on the event loop of its app, whichever loop it is awaited on."""

    async def passed_on(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        owner = self._owner
        if owner.claim():
            return await method(self, *args, **kwargs)
        return await owner.call(lambda: method(self, *args, **kwargs))

    return update_wrapper(passed_on, method)


def blocking(method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[S, P], T]:
    """Make the blocking twin of an async method. It raises `InvalidInput` when it is called inside an event loop."""

    def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        refuse_in_loop(f"{method.__name__}_sync()", f"await {method.__name__}(…)")
        return self._owner.run(method(self, *args, **kwargs))

    _name_twin(twin, method)
    return twin


def blocking_iterator(
    method: Callable[Concatenate[S, P], AsyncIterator[T]],
) -> Callable[Concatenate[S, P], Iterator[T]]:
    """Make the blocking twin of a method that returns an async iterator; it is closed when the loop over it ends."""

    def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        refuse_in_loop(f"{method.__name__}_sync()", f"async for … in {method.__name__}(…)")
        return iterate(self._owner, method(self, *args, **kwargs))

    _name_twin(twin, method)
    return twin


def _name_twin(twin: Callable[..., Any], method: Callable[..., Any]) -> None:
    update_wrapper(twin, method)
    twin.__name__ = f"{method.__name__}_sync"
    twin.__qualname__ = f"{method.__qualname__}_sync"
    twin.__doc__ = f"Blocking form of `{method.__name__}`, for code that is not async."


def iterate(owner: OwnerLoop, iterator: AsyncIterator[T]) -> Iterator[T]:
    """Iterate over an async iterator from code that is not async."""

    async def advance() -> tuple[bool, Any]:
        try:
            return True, await anext(iterator)
        except StopAsyncIteration:
            return False, None

    async def close() -> None:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()

    try:
        while True:
            has_item, item = owner.run(advance())
            if not has_item:
                return
            yield item
    finally:
        owner.run(close())


def refuse_in_loop(call: str, instead: str) -> None:
    """Raise `InvalidInput` when the calling thread runs an event loop, which a blocking call would stop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise InvalidInput(
        f"{call} can't be called inside a running event loop: it would block it",
        hint=f"write: {instead}; code that can't await is called in a thread: await asyncio.to_thread(…)",
    )
