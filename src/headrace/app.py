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
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from headrace.compose import open_engine
from headrace.core.retry import NO_RETRY, Retry
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.foundation.ids import parse_run_id
from headrace.foundation.settings import Settings, load
from headrace.handles import PLAIN, Batch, ResultOf, Run
from headrace.runtime.background_loop import Background
from headrace.runtime.engine import Engine
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import OnExhausted, Pool, TaskSpec
from headrace.runtime.worker.worker import Worker
from headrace.task import Decorator, P, R, T, Task

if TYPE_CHECKING:
    from headrace.core.entity import Entity
    from headrace.core.schedule import CatchUp
    from headrace.grpc.taskbroker.activation_intake import Taken
    from headrace.indexer import Indexer
    from headrace.runtime.indexing.handler_registry import Unknown
    from headrace.runtime.indexing.pipeline import Where
    from headrace.runtime.indexing.sources.source import Source
    from headrace.runtime.tasks.http_endpoint import Endpoint


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
        self._endpoints: list[Endpoint] = []

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
        delay_s: float = 0,
        expires_s: float = 0,
        on_exhausted: OnExhausted = "discard",
    ) -> Decorator: ...
    def task(self, *functions: Any, **options: Any) -> Any:
        """Register a function. Async ones run on the loop, plain ones in threads or (`pool="process"`) in processes.

        `name` (default: the function's own), `retry` (default: none), `timeout_s` an attempt may take, `queue` and
        `priority` unless a call says otherwise, `at_most_once` for what must rather be lost than run twice. `delay_s`
        and `expires_s` of each enqueue and map, unless that says otherwise. With `on_exhausted="dead_letter"` a run
        that failed for good is kept on a list until somebody redrives or purges it.
        """

        def register(function: Callable[..., Any]) -> Task[Any, Any]:
            known = {"name": getattr(function, "__name__", "?"), **options}
            spec = TaskSpec(**(known | {"name": options.get("name") or known["name"], "function": function}))
            self.registry.add(spec)
            return Task(self, spec)

        return register(*functions) if functions else register

    def endpoint(
        self,
        name: str,
        url: str,
        *,
        secret: str | Sequence[str],
        headers: Mapping[str, str] | None = None,
        allow: Sequence[str] = (),
        ca_file: str | None = None,
        retry: Retry | None = None,
        timeout_s: float = 30.0,
        queue: str = "default",
        priority: int = 0,
        at_most_once: bool = False,
    ) -> Task[[Any], Any]:
        """A task that lives behind a URL: each attempt POSTs the payload as JSON, signed with `secret`.

        2xx is done, and a JSON or text body of at most 1 MiB is the result; 429, 503, other 5xx and no answer are
        tried again (five times, unless `retry` says otherwise; `Retry-After` is heard); every other status fails.
        `Idempotency-Key` is the run's id on every attempt. Only public addresses are reached, over https, and
        networks that `allow` names (`["10.1.0.0/16"]`), over http as well. Several secrets sign side by side, so
        that one can replace another. `ca_file`: who is trusted beside the system's own. Raises `InvalidSetting`.
        """
        from headrace.core.endpoint import EndpointRefused
        from headrace.runtime.tasks.http_endpoint import RETRY, Endpoint

        found = Endpoint(url, secret, headers=headers, allow=allow, ca_file=ca_file)
        policy = RETRY if retry is None else retry
        if isinstance(policy, Retry):
            policy = replace(policy, give_up_on=(*policy.give_up_on, EndpointRefused))
        spec = TaskSpec(
            name=name,
            function=found.deliver,
            retry=policy,
            timeout_s=timeout_s,
            queue=queue,
            priority=priority,
            at_most_once=at_most_once,
        )
        self.registry.add(spec)
        self._endpoints.append(found)
        return Task(self, spec)

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
        from headrace.runtime.tasks.bounds import check_name
        from headrace.runtime.tasks.schedule_spec import schedule_of

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

    async def activate(self, *messages: bytes) -> Taken:
        """Make activations durable, each a `TaskActivation` in protobuf, once by its id: for the task broker's workers.

        Those that can't be kept are told in the answer, and the others are in.
        """
        try:
            from headrace.grpc.taskbroker.activation_intake import ActivationIntake
        except ModuleNotFoundError as error:
            raise InvalidSetting(f"activations need {error.name}", hint="pip install 'headrace[grpc]'") from None
        return await ActivationIntake(await self.open(), await self.producer()).take_all(messages)

    async def close(self) -> None:
        """Write what is still to be written and let go of the store. Closing twice does nothing."""
        producer, self._producer = self._producer, None
        try:
            if producer is not None:
                await producer.close()
        finally:
            engine, self._engine, self._is_lent = self._engine, None, False
            self._loop = self._opening = None
            for endpoint in self._endpoints:
                await endpoint.close()
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
