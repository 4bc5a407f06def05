"""Tasks as users hold them: call one, enqueue one run of it, map it over a stream of items."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from headrace.compose import joined
from headrace.foundation.errors import InvalidInput
from headrace.foundation.suggestions import names_checked
from headrace.handles import Batch, HandleOwner, Run
from headrace.runtime.owner_loop import OwnerLoop
from headrace.runtime.producing.caller_items import CallerItems, LoopItems, ThreadItems
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.bounds import check_is_list
from headrace.runtime.tasks.call_options import Options
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.store.transactions.append import enqueue
from headrace.store.transactions.sql_script import Script
from headrace.twins import blocking, on_owner_loop, refuse_in_loop

P = ParamSpec("P")
R = TypeVar("R")


class TaskOwner(HandleOwner, Protocol):
    """The part of an app that its tasks use."""

    async def producer(self) -> Producer:
        """Return the producer of this process."""
        ...


class Task(Generic[P, R]):
    """A registered function: call it directly, enqueue one run of it, or map it over a stream of items.

    `P` are its parameters, `R` is what a run results in. `AsyncTask` and `SyncTask` say what a direct call returns.
    """

    def __init__(self, app: TaskOwner, spec: TaskSpec) -> None:
        self.app = app
        self.spec = spec
        self.__name__ = spec.name
        self.__doc__ = spec.function.__doc__
        self.__wrapped__ = spec.function

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    @property
    def name(self) -> str:
        """The task's name in the store, on the command line and over the network."""
        return self.spec.name

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function itself, in this process and without Headrace."""
        return self.spec.function(*args, **kwargs)

    async def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Store one run; it is durable when this returns. Concurrent calls share a commit.

        Raises `InvalidInput` when the arguments don't fit the task.
        """
        return await self._enqueue(Options(), args, kwargs)

    @names_checked("task.options()")
    def options(
        self,
        *,
        delay_s: float = 0,
        priority: int | None = None,
        queue: str | None = None,
        idempotency_key: str = "",
        idempotency_ttl_s: float = 0,
        expires_s: float = 0,
        tags: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> TaskCall[P, R]:
        """Return the task with options for the calls made through it: `task.options(delay_s=60).enqueue(…)`.

        - `delay_s`: seconds until the run may start.
        - `expires_s`: seconds in which it must start, else it expires; 0 is no limit.
        - `priority`: runs with a larger number start first. `queue`: the queue instead of the task's own.
        - `idempotency_key`: while a run of this task with that key exists, `enqueue` returns it instead of a new run.
          A run that failed, was cancelled or expired is replaced (never of a task that runs at most once).
        - `idempotency_ttl_s`: seconds for which the key is kept; 0 is as long as the run.
        - `tags` and `headers`: stored with the run; a task reads its headers from its `Context`.
        """
        check_is_list("tags", tags)
        return TaskCall(
            self,
            Options(
                delay_s=delay_s,
                expires_s=expires_s,
                priority=priority,
                queue=queue,
                idempotency_key=idempotency_key,
                idempotency_ttl_s=idempotency_ttl_s,
                tags=tuple(tags),
                headers=dict(headers or {}),
            ),
        )

    @names_checked("task.map()")
    async def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        batch_key: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Batch[R]:
        """Store one run for each item; the batch is durable and sealed when this returns.

        Items are streamed, the whole input is never in memory. A task of one parameter takes an item whole; of
        several, a mapping as keyword arguments or a list as positional ones. An item that doesn't fit becomes a failed
        run at its own index. With a `batch_key` the call can be repeated: it finds the batch of that key and adds the
        items that are missing.
        """
        return await self._map(Options(), items, batch_key, metadata)

    async def enqueue_in(self, connection: Any, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Store one run in the transaction that is open on `connection`: it commits or rolls back with it.

        `connection` is a connection to the database of the app's store: asyncpg's, psycopg 3's, sqlite3's or
        aiosqlite's, or a SQLAlchemy connection or session over any of these. One that is not async is used on this
        event loop. The first run ever of a task in a queue makes concurrent first runs of the same wait for the
        commit. Raises `InvalidInput` when no transaction is open, or the connection leads to another database.
        """
        return await self._enqueue_in(Options(), connection, args, kwargs)

    def enqueue_in_sync(self, connection: Any, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """`enqueue_in` for code that is not async, on a connection that is not; it is used in the calling thread."""
        return self._enqueue_in_sync(Options(), connection, args, kwargs)

    enqueue_sync = blocking(enqueue)

    @names_checked("task.map_sync()")
    def map_sync(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        batch_key: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Batch[R]:
        """Blocking form of `map`, for code that is not async. The items are taken in the calling thread."""
        return self._map_sync(Options(), items, batch_key, metadata)

    @property
    def _owner(self) -> OwnerLoop:
        return self.app.owner_loop

    async def _enqueue_in(
        self, options: Options, connection: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Run[R]:
        script, run_of = await self._single(options, args, kwargs)
        return run_of(await joined(await self.app.open(), connection).run(script))

    def _enqueue_in_sync(
        self, options: Options, connection: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Run[R]:
        refuse_in_loop("enqueue_in_sync()", "await task.enqueue_in(connection, …), which takes such connections too")
        script, run_of = self._owner.run(self._single(options, args, kwargs))
        return run_of(joined(self._owner.run(self.app.open()), connection).run_sync(script))

    @on_owner_loop
    async def _single(
        self, options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Callable[[], Script[tuple[str, int]]], Callable[[tuple[str, int]], Run[R]]]:
        """Return the script that stores one run in a transaction, and the maker of a handle from its answer."""
        payload = self.spec.codec.encode(args, kwargs)
        producer = await self.app.producer()
        new, chunk = await producer.build_single(self.spec, payload, options)
        now_us = producer.engine.clock.now_us()
        return lambda: enqueue(new, chunk, now_us), lambda run: self._run(producer, run)

    def request(self, /, *args: P.args, **kwargs: P.kwargs) -> tuple[TaskSpec, Options, bytes]:
        """Return one call as it is stored, for a caller that appends it in a transaction of its own."""
        return self.spec, Options(), self.spec.codec.encode(args, kwargs)

    @on_owner_loop
    async def _enqueue(self, options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run[R]:
        payload = self.spec.codec.encode(args, kwargs)
        producer = await self.app.producer()
        return self._run(producer, await producer.enqueue(self.spec, payload, options))

    async def _map(
        self,
        options: Options,
        items: Iterable[Any] | AsyncIterable[Any],
        batch_key: str | None,
        metadata: Mapping[str, object] | None,
    ) -> Batch[R]:
        _check_items(self.name, items)
        is_here = isinstance(items, Sequence) or self._owner.claim()
        return await self._map_on_owner(options, items if is_here else LoopItems(items), batch_key, metadata)

    def _map_sync(
        self,
        options: Options,
        items: Iterable[Any] | AsyncIterable[Any],
        batch_key: str | None,
        metadata: Mapping[str, object] | None,
    ) -> Batch[R]:
        refuse_in_loop("map_sync()", "await map(…)")
        _check_items(self.name, items)
        if isinstance(items, Sequence | AsyncIterable):
            return self._owner.run(self._map_on_owner(options, items, batch_key, metadata))
        own_items = ThreadItems(items)
        mapping = self._map_on_owner(options, own_items, batch_key, metadata)
        return self._owner.run(mapping, beside=own_items.serve)

    @on_owner_loop
    async def _map_on_owner(
        self,
        options: Options,
        items: Iterable[Any] | AsyncIterable[Any] | CallerItems,
        batch_key: str | None,
        metadata: Mapping[str, object] | None,
    ) -> Batch[R]:
        producer = await self.app.producer()
        batch_id = await producer.map(self.spec, items, options, key=batch_key, metadata=dict(metadata or {}))
        return Batch(self.app, producer.engine, batch_id, self.spec.codec.result_of)

    def _run(self, producer: Producer, run: tuple[str, int]) -> Run[R]:
        batch_id, index = run
        return Run(self.app, producer.engine, batch_id, index, self.spec.codec.result_of)


def _check_items(task: str, items: object) -> None:
    """Raise `InvalidInput` for one item where many are expected: a text or a mapping would be taken apart."""
    is_iterable = any(hasattr(items, method) for method in ("__iter__", "__aiter__", "__getitem__"))
    if isinstance(items, str | bytes | bytearray | Mapping) or not is_iterable:
        kind = type(items).__name__
        article = "an" if kind[0].lower() in "aeiou" else "a"
        raise InvalidInput(
            f"{task}.map() expected an iterable of items, got {article} {kind}",
            hint=f"for one item write {task}.map([…])",
        )


class AsyncTask(Task[P, R]):
    """A task that is an `async def`: `await task(…)` calls the function itself."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function itself, in this process and without Headrace."""
        coroutine: Coroutine[Any, Any, R] = self.spec.function(*args, **kwargs)
        return coroutine


class SyncTask(Task[P, R]):
    """A task that is a plain function: `task(…)` calls the function itself."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself, in this process and without Headrace."""
        value: R = self.spec.function(*args, **kwargs)
        return value


class TaskCall(Generic[P, R]):
    """A task with options for its calls; `Task.options` makes it."""

    def __init__(self, task: Task[P, R], options: Options) -> None:
        self._task = task
        self._options = options

    async def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Store one run with these options; see `Task.enqueue`."""
        return await self._task._enqueue(self._options, args, kwargs)  # noqa: SLF001 - one class in two halves

    async def enqueue_in(self, connection: Any, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Store one run with these options in the caller's transaction; see `Task.enqueue_in`."""
        return await self._task._enqueue_in(self._options, connection, args, kwargs)  # noqa: SLF001 - as above

    def enqueue_in_sync(self, connection: Any, /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Store one run with these options in the caller's transaction; see `Task.enqueue_in_sync`."""
        return self._task._enqueue_in_sync(self._options, connection, args, kwargs)  # noqa: SLF001 - as above

    def request(self, /, *args: P.args, **kwargs: P.kwargs) -> tuple[TaskSpec, Options, bytes]:
        """Return one call with these options as it is stored."""
        spec, _, payload = self._task.request(*args, **kwargs)
        return spec, self._options, payload

    @names_checked("task.map()")
    async def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        batch_key: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Batch[R]:
        """Store one run for each item, all with these options; see `Task.map`."""
        return await self._task._map(self._options, items, batch_key, metadata)  # noqa: SLF001 - as above

    enqueue_sync = blocking(enqueue)

    @names_checked("task.map_sync()")
    def map_sync(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        batch_key: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Batch[R]:
        """Blocking form of `map`, for code that is not async. The items are taken in the calling thread."""
        return self._task._map_sync(self._options, items, batch_key, metadata)  # noqa: SLF001 - as above

    @property
    def _owner(self) -> OwnerLoop:
        return self._task.app.owner_loop


class Decorator(Protocol):
    """The type of `app.task(…)` with options: it makes a task of a function, async or not."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # an async def is a function too: the first match counts
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...
