"""A task as a user holds it: call it, enqueue one run of it, map it over a stream of items."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from headrace.compose import joined
from headrace.handles import Batch, Run
from headrace.runtime.engine import Engine
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.call_options import Options
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.store.verbs.appending import enqueue
from headrace.store.verbs.script import Script

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class App(Protocol):
    """What a task asks of the app that it belongs to."""

    async def open(self) -> Engine:
        """The engine, opened when needed."""
        ...

    async def producer(self) -> Producer:
        """What enqueues and maps for this process."""
        ...

    def run_sync(self, awaitable: Awaitable[T]) -> T:
        """Await something from code that is not async."""
        ...


class Task(Generic[P, R]):
    """A registered function: call it as it is, enqueue one run of it, or map it over a stream of items."""

    def __init__(self, app: App, spec: TaskSpec) -> None:
        self.app = app
        self.spec = spec
        self.__name__ = spec.name
        self.__doc__ = spec.function.__doc__

    @property
    def name(self) -> str:
        """What the store, the wire and people call it."""
        return self.spec.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function itself, here and now, without Headrace."""
        return self.spec.function(*args, **kwargs)

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Ask for one run. Durable when it returns; many at once share a commit.

        Raises `InvalidInput` when the arguments don't fit the task.
        """
        return await self._enqueue(Options(), args, kwargs)

    def options(
        self,
        *,
        delay: float = 0,
        priority: int | None = None,
        queue: str | None = None,
        idempotency_key: str = "",
        idempotency_ttl: float = 0,
        expires: float = 0,
        tags: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> TaskCall[P, R]:
        """The same task with options for the calls made through it.

        `delay`, `expires` and `idempotency_ttl` are seconds; 0 is now, never and for ever. `priority`: larger goes
        first. A run whose `idempotency_key` already names a run of this task is that run, unless that failed, was
        cancelled or expired: then it is a new one (never of a task that runs at most once).
        """
        return TaskCall(
            self,
            Options(
                delay_s=delay,
                expires_s=expires,
                priority=priority,
                queue=queue,
                idempotency_key=idempotency_key,
                idempotency_ttl_s=idempotency_ttl,
                tags=tuple(tags),
                headers=dict(headers or {}),
            ),
        )

    async def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        key: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Batch[R]:
        """One run for each item, streamed and never held whole; durable and sealed when it returns.

        A task of one parameter takes an item whole; of several, a mapping as keyword arguments or a list as
        positional ones. An item that doesn't fit becomes a failed run at its own index. With a `key` the same key
        answers the same batch: mapping again adds what is missing and nothing twice.
        """
        return await self._map(Options(), items, key, metadata)

    async def enqueue_in(self, connection: Any, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Ask for one run in the transaction that is open on `connection`: there once it commits, gone with it if not.

        `connection` leads to the database of the app's store: asyncpg's, psycopg 3's, sqlite3's or aiosqlite's, or a
        SQLAlchemy connection or session over any of these. One that is not async is used as it is, on this loop.
        The first run ever of a task in a queue makes others that begin with the same wait for the commit. Raises
        `InvalidInput` when no transaction is open, or the connection leads to the other kind of database.
        """
        return await self._enqueue_in(Options(), connection, args, kwargs)

    def enqueue_in_sync(self, connection: Any, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """`enqueue_in` for code that is not async, on a connection that is not."""
        return self._enqueue_in_sync(Options(), connection, args, kwargs)

    async def _enqueue_in(
        self, options: Options, connection: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Run[R]:
        script, run_of = await self._alone(options, args, kwargs)
        return run_of(await joined(await self.app.open(), connection).run(script))

    def _enqueue_in_sync(
        self, options: Options, connection: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Run[R]:
        script, run_of = self.app.run_sync(self._alone(options, args, kwargs))
        return run_of(joined(self.app.run_sync(self.app.open()), connection).run_sync(script))

    async def _alone(
        self, options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Callable[[], Script[tuple[str, int]]], Callable[[tuple[str, int]], Run[R]]]:
        """What puts one run into a transaction, and what makes a handle of its answer."""
        payload = self.spec.codec.encode(args, kwargs)
        producer = await self.app.producer()
        new, chunk = await producer.alone(self.spec, payload, options)
        now_us = producer.engine.clock.now_us()
        return (
            lambda: enqueue(new, chunk, now_us),
            lambda name: Run(producer.engine, *name, self.spec.codec.result_of),
        )

    def request(self, *args: P.args, **kwargs: P.kwargs) -> tuple[TaskSpec, Options, bytes]:
        """One run as it would be asked for, for somebody who appends it in a transaction of their own."""
        return self.spec, Options(), self.spec.codec.encode(args, kwargs)

    async def _enqueue(self, options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run[R]:
        payload = self.spec.codec.encode(args, kwargs)
        producer = await self.app.producer()
        batch_id, index = await producer.enqueue(self.spec, payload, options)
        return Run(producer.engine, batch_id, index, self.spec.codec.result_of)

    async def _map(
        self,
        options: Options,
        items: Iterable[Any] | AsyncIterable[Any],
        key: str | None,
        metadata: Mapping[str, object] | None,
    ) -> Batch[R]:
        producer = await self.app.producer()
        batch_id = await producer.map(self.spec, items, options, key=key, metadata=dict(metadata or {}))
        return Batch(producer.engine, batch_id, self.spec.codec.result_of)


class TaskCall(Generic[P, R]):
    """A task with options; made by `Task.options`."""

    def __init__(self, task: Task[P, R], options: Options) -> None:
        self._task = task
        self._options = options

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Ask for one run with these options."""
        return await self._task._enqueue(self._options, args, kwargs)  # noqa: SLF001 - one class in two halves

    async def enqueue_in(self, connection: Any, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Ask for one run with these options, in the caller's own transaction."""
        return await self._task._enqueue_in(self._options, connection, args, kwargs)  # noqa: SLF001 - as above

    def enqueue_in_sync(self, connection: Any, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """The same for code that is not async."""
        return self._task._enqueue_in_sync(self._options, connection, args, kwargs)  # noqa: SLF001 - as above

    def request(self, *args: P.args, **kwargs: P.kwargs) -> tuple[TaskSpec, Options, bytes]:
        """One run with these options as it would be asked for."""
        spec, _, payload = self._task.request(*args, **kwargs)
        return spec, self._options, payload

    async def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        key: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Batch[R]:
        """One run for each item, all with these options."""
        return await self._task._map(self._options, items, key, metadata)  # noqa: SLF001 - one class in two halves


class Decorator:
    """The type of `app.task(...)` with options."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        raise NotImplementedError
