"""The public face: an app, its tasks, and handles on what they were asked to do.

app = Headrace("library")

@app.task(retry=Retry(attempts=5), timeout_s=30)
async def outline(path: str, source: str) -> Outline: ...

async with app.worker():
    batch = await outline.map(items())
    async for outcome in batch.results():
        ...
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Self, TypeVar, overload

from headrace.compose import joined, open_engine
from headrace.core.retry import NO_RETRY, Retry
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.foundation.ids import parse_run_id
from headrace.foundation.settings import Settings, load
from headrace.handles import PLAIN, Batch, ResultOf, Run
from headrace.runtime.background import Background
from headrace.runtime.engine import Engine
from headrace.runtime.producer import Options, Producer
from headrace.runtime.registry import Pool, Registry, TaskSpec
from headrace.runtime.worker import Worker
from headrace.store.verbs.appending import enqueue
from headrace.store.verbs.script import Script

if TYPE_CHECKING:
    from headrace.core.entity import Entity
    from headrace.core.schedule import CatchUp
    from headrace.indexer import Indexer
    from headrace.runtime.handlers import Unknown
    from headrace.runtime.indexer import Where
    from headrace.runtime.sources.source import Source

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Task(Generic[P, R]):
    """A registered function: call it as it is, enqueue one run of it, or map it over a stream of items."""

    def __init__(self, app: Headrace, spec: TaskSpec) -> None:
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


class Headrace:
    """An app: tasks by name, and the store they live in.

    `store`, `objects`, `environment` and any limit by its name (`flush_size=…`) override what the environment
    (`HEADRACE_STORE`, …) and `headrace.toml` say. Nothing is opened before it is needed; use the app as an async
    context manager, or call `close`.
    """

    def __init__(
        self,
        name: str = "app",
        *,
        store: str | None = None,
        objects: str | None = None,
        environment: str | None = None,
        **settings: int,
    ) -> None:
        self.name = name
        self.registry = Registry(name)
        self._flags: dict[str, object | None] = {
            "store": store,
            "objects": objects,
            "environment": environment,
            **settings,
        }
        self._settings: Settings | None = None
        self._engine: Engine | None = None
        self._producer: Producer | None = None
        self._opening: asyncio.Lock | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_lent = False
        self._background: Background | None = None

    # -- tasks

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        *,
        name: str | None = None,
        retry: Retry = NO_RETRY,
        timeout_s: float | None = None,
        queue: str = "default",
        priority: int = 0,
        pool: Pool = "auto",
        at_most_once: bool = False,
    ) -> _Decorator: ...
    def task(self, *functions: Any, **options: Any) -> Any:
        """Register a function. Async ones run on the loop, plain ones in threads or (`pool="process"`) in processes.

        `name` (default: the function's own), `retry` (default: none), `timeout_s` an attempt may take, `queue` and
        `priority` unless a call says otherwise, `at_most_once` for what must rather be lost than run twice.
        """

        def register(function: Callable[..., Any]) -> Task[Any, Any]:
            known = {"name": getattr(function, "__name__", "?"), **options}
            spec = TaskSpec(**(known | {"name": options.get("name") or known["name"], "function": function}))
            self.registry.add(spec)
            return Task(self, spec)

        return register(*functions) if functions else register

    # -- schedules

    @overload
    def schedule(
        self, cron: str, /, *, tz: str | None = None, name: str | None = None, catch_up: CatchUp = "once"
    ) -> Callable[[Task[P, R]], Task[P, R]]: ...
    @overload
    def schedule(
        self, *, every_s: float, name: str | None = None, catch_up: CatchUp = "once"
    ) -> Callable[[Task[P, R]], Task[P, R]]: ...
    @overload
    def schedule(
        self,
        task: Task[P, R],
        cron: str | None = None,
        /,
        *,
        every_s: float | None = None,
        tz: str | None = None,
        name: str | None = None,
        catch_up: CatchUp = "once",
    ) -> Task[P, R]: ...
    def schedule(
        self,
        *positional: Any,
        every_s: float | None = None,
        tz: str | None = None,
        name: str | None = None,
        catch_up: CatchUp = "once",
    ) -> Any:
        """Run a task by the clock: `@app.schedule("30 6 * * MON-FRI", tz="Europe/Berlin")` above `@app.task`.

        `every_s` instead of a cron expression is an interval. Each tick is enqueued once, whatever the number of
        workers. `catch_up` says what becomes of ticks that came while no worker ran: `once` runs the newest, `all` each
        of them (the newest `schedule_ticks_max`), `skip` none. `name`: default the task's. A task of one datetime gets
        the time of its tick, in that time zone; so does any as `Context.scheduled_us`.
        """
        from headrace.runtime.registry import check_name
        from headrace.runtime.schedules import schedule_of

        def register(task: Any, cron: str | None) -> Any:
            if not isinstance(task, Task) or task.app is not self:
                raise InvalidSetting(
                    f"what is scheduled is a task of this app, not {task!r}",
                    hint="write @app.schedule(…) above @app.task",
                )
            check_name("app", self.name)
            self.registry.add_schedule(schedule_of(task.spec, cron, every_s, tz, name, catch_up))
            return task

        if positional and not isinstance(positional[0], str):
            return register(positional[0], *positional[1:] or (None,))
        return lambda task: register(task, *positional or (None,))

    # -- indexers

    def indexer(
        self,
        name: str,
        *,
        source: Source | Mapping[str, Source],
        entities: Sequence[type[Entity]],
        history: int | Literal["all"] = 0,
        where: Where = "overlay",
        defer_indexes: bool = False,
        preload: bool = True,
        unknown: Unknown = "refuse",
    ) -> Indexer:
        """An indexer: ordered events of `source` become rows of `entities` through handlers.

        `source`: one, or several by name, merged by time. `history`: how many events can be taken back, "all" for
        every one. `where="drain"` awaits the commits in flight before a SELECT. `defer_indexes`: indexes are built when
        they are first asked for, or when the sources end. `preload=False` never runs handlers ahead. `unknown="skip"`
        passes over kinds of events that have no handler.
        """
        from headrace.indexer import Indexer

        return Indexer(
            self,
            name,
            source=source,
            entities=entities,
            history=history,
            where=where,
            defer_indexes=defer_indexes,
            preload=preload,
            unknown=unknown,
        )

    # -- life

    def use(self, settings: Settings) -> None:
        """Work with these settings, whatever the app was made with. Before anything is opened."""
        if self._engine is not None:
            raise InvalidSetting("the app is open already; settings come before")
        self._settings = settings

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        if self._settings is None:
            self._settings = load(self._flags, os.environ, Path.cwd())
        return self._settings

    async def open(self) -> Engine:
        """Open the store, once; everything else does it when needed. An app works on one event loop at a time."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            await self._move_to(loop)
        assert self._opening is not None
        async with self._opening:
            if self._engine is None:
                self._engine = await open_engine(self.settings)
            return self._engine

    async def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin on this loop; what was open on one that has closed (`asyncio.run` twice, no `close`) is left behind."""
        if self._loop is not None and not self._loop.is_closed() and self._engine is not None:
            raise InvalidSetting(
                "the app is open on another event loop",
                hint="make one Headrace for each loop, or call app.run_sync(…) from other threads",
            )
        self._loop, self._opening = loop, asyncio.Lock()
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.abandon()
        if not self._is_lent and self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.close()

    def use_engine(self, engine: Engine) -> None:
        """Work on an engine that somebody else opened (the testing mode)."""
        self._engine, self._is_lent = engine, True

    async def producer(self) -> Producer:
        """What enqueues and maps for this process."""
        engine = await self.open()
        if self._producer is None:
            self._producer = Producer(engine)
        return self._producer

    async def close(self) -> None:
        """Write what is still to be written and let go of the store. Closing twice does nothing."""
        producer, self._producer = self._producer, None
        try:
            if producer is not None:
                await producer.close()
        finally:
            engine, self._engine, self._is_lent = self._engine, None, False
            self._loop = self._opening = None
            if engine is not None:
                await engine.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @asynccontextmanager
    async def worker(
        self,
        *,
        tasks: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        concurrency: int | None = None,
        processes: int | None = None,
    ) -> AsyncGenerator[Worker, None]:
        """Run this app's tasks in this process while the block lasts; leaving it ends in good order.

        Its schedules tick as well, unless the worker is for some `tasks` only.
        """
        engine = await self.open()
        settings = self.settings
        worker = Worker(
            engine,
            self.registry,
            tasks=tasks,
            queues=queues,
            concurrency=settings.concurrency if concurrency is None else concurrency,
            processes=settings.processes if processes is None else processes,
            schedules=tasks is None,
        )
        await worker.start()
        try:
            yield worker
        finally:
            await worker.stop()

    # -- what was asked for

    async def batch(self, batch_id: str) -> Batch[Any]:
        """A handle on a batch by its id. Raises `NotFound`."""
        engine = await self.open()
        batch, _ = await engine.store.batch(batch_id)
        return Batch(engine, batch_id, self._result_of(batch.task))

    async def run(self, run_id: str) -> Run[Any]:
        """A handle on a run by its id. Raises `NotFound`."""
        engine = await self.open()
        batch_id, index = parse_run_id(run_id)
        view = await engine.store.run(batch_id, index)
        return Run(engine, batch_id, index, self._result_of(view.task))

    def _result_of(self, task: str) -> ResultOf:
        return self.registry.get(task).codec.result_of if task in self.registry else PLAIN

    # -- for scripts

    def run_sync(self, awaitable: Awaitable[T]) -> T:
        """Await something from code that is not async: `app.run_sync(outline.map(items))`.

        One loop in one background thread serves every call of the app, so handles and workers keep working between
        calls. Not from inside a running event loop.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            raise InvalidInput("run_sync would block the event loop that runs here", hint="await it instead")
        if self._background is None:
            self._background = Background()
        return self._background.run(awaitable)

    def iter_sync(self, iterator: AsyncIterator[T]) -> Iterable[T]:
        """Iterate over something async from code that is not."""
        try:
            while True:
                try:
                    item = self.run_sync(anext(iterator))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if isinstance(iterator, AsyncGenerator):
                self.run_sync(iterator.aclose())

    @contextmanager
    def within_sync(self, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Enter something async from code that is not: `with app.within_sync(app.worker()): …`."""
        entered = self.run_sync(context.__aenter__())
        try:
            yield entered
        except BaseException as error:
            if not self.run_sync(context.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self.run_sync(context.__aexit__(None, None, None))

    def close_sync(self) -> None:
        """`close`, and the end of the background loop."""
        background, self._background = self._background, None
        if background is not None:
            try:
                background.run(self.close())
            finally:
                background.stop()


class _Decorator:
    """The type of `app.task(...)` with options."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        raise NotImplementedError


def task_of(found: object) -> Task[Any, Any] | None:
    """`found` when it is a task."""
    return found if isinstance(found, Task) else None
