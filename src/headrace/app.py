"""The public API: an app with its tasks, and handles on their runs and batches.

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
import dataclasses
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, overload

from headrace.compose import open_engine
from headrace.core.retry import NO_RETRY, Retry
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.foundation.ids import check_batch_id, parse_run_id
from headrace.foundation.settings import Settings, check_overrides, load
from headrace.foundation.suggestions import check_names, names_checked
from headrace.handles import PLAIN, Batch, ResultOf, Run
from headrace.runtime.background_loop import close_unused
from headrace.runtime.engine import Engine
from headrace.runtime.owner_loop import OwnerLoop
from headrace.runtime.producing.producer import Producer
from headrace.runtime.tasks.bounds import check_is_list, check_name
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import OnExhausted, Pool, TaskSpec
from headrace.runtime.worker.worker import Worker
from headrace.store.paging import listed_batches, listed_runs
from headrace.store.projections import check_batch_state, check_run_state
from headrace.task import AsyncTask, Decorator, P, R, SyncTask, Task
from headrace.twins import blocking, iterate, on_owner_loop, refuse_in_loop
from headrace.views import BatchView, RunView, batch_view, listed_views

if TYPE_CHECKING:
    from headrace.core.entity import Entity
    from headrace.core.schedule import CatchUp
    from headrace.grpc.taskbroker.activation_intake import IntakeResult
    from headrace.indexer import Indexer
    from headrace.runtime.indexing.definition import Where
    from headrace.runtime.indexing.handler_registry import Unknown
    from headrace.runtime.indexing.sources.source import Source
    from headrace.runtime.tasks.http_endpoint import Endpoint

T = TypeVar("T")
AnyTask = TypeVar("AnyTask", bound=Task[..., Any])
TASK_OPTIONS: Final = tuple(
    field.name for field in dataclasses.fields(TaskSpec) if field.init and field.name != "function"
)


class Headrace:
    """An app: tasks by name, and the store of their runs.

    `store`, `objects`, `environment` and any setting by its name (`flush_size=…`) override `headrace.toml`;
    environment variables (`HEADRACE_STORE`, …) override them, and flags of a command that names the app do too. The
    store is opened at the first use. Use the app as an async context manager, or call `close`. Raises `InvalidSetting`
    for an unknown setting or a value out of its bounds.

    Methods ending in `_sync` are the blocking forms of async methods, for code that is not async. Every method works
    from any thread and on any event loop: the first loop on which the app is used does the work of all of them.
    """

    def __init__(
        self,
        name: str = "app",
        *,
        store: str | None = None,
        objects: str | None = None,
        environment: str | None = None,
        **settings: int | str,
    ) -> None:
        try:
            self.name = check_name("name", name)
        except InvalidInput as error:
            raise InvalidSetting(f"Headrace(): {error.message}", hint='write Headrace("my-app")') from None
        self.registry = Registry(name)
        self.declared: Final[Mapping[str, object | None]] = {
            "store": store,
            "objects": objects,
            "environment": environment,
            **settings,
        }
        check_overrides("Headrace()", self.declared)
        self._settings: Settings | None = None
        self._engine: Engine | None = None
        self._producer: Producer | None = None
        self._opening: asyncio.Lock | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._was_lent_in_parent = False
        self.owner_loop = OwnerLoop(is_open=lambda: self._engine is not None, on_forked=self._begin_anew)
        self._endpoints: list[Endpoint] = []

    # -- tasks

    @overload
    def task(  # type: ignore[overload-overlap]  # an async def is a function too: the first match counts
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...
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
        """Register a function as a task: `@app.task` or `@app.task(retry=Retry(attempts=5), timeout_s=30)`.

        An `async def` runs on the worker's event loop, a plain function in a thread, or with `pool="process"` in a
        child process.

        - `name`: default the function's name. `retry`: default no retries.
        - `timeout_s`: the longest time that an attempt may take.
        - `queue`, `priority`, `delay_s`, `expires_s`: defaults of its runs; see `Task.options`.
        - `at_most_once`: a run whose worker crashed fails and is not run again: prefer loss over duplicates.
        - `on_exhausted="dead_letter"`: a run that failed for good is kept on the dead-letter list until it is redriven
          or purged.

        Raises `InvalidSetting`, naming the option.
        """
        check_names("app.task()", options, TASK_OPTIONS, "option")

        def register(function: Any) -> Task[Any, Any]:
            if not callable(function):
                raise InvalidSetting(
                    f"app.task() expected a function, got {function!r}",
                    hint="options have names: name='…', timeout_s=…",
                )
            named = {"name": getattr(function, "__name__", "?"), **options}
            spec = TaskSpec(**(named | {"name": options.get("name") or named["name"], "function": function}))
            self.registry.add(spec)
            return (AsyncTask if spec.is_async else SyncTask)(self, spec)

        if len(functions) > 1 or (functions and options):
            raise InvalidSetting(
                f"app.task() expected one function or options by name, got {len(functions)} positional arguments",
                hint="write @app.task(timeout_s=30) above the function",
            )
        return register(*functions) if functions else register

    @names_checked("app.endpoint()")
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
    ) -> AsyncTask[[Any], Any]:
        """Register an HTTPS endpoint as a task: each attempt POSTs the payload as JSON, signed with `secret`.

        - A 2xx status completes the run; a JSON or text body of at most 1 MiB is its result. 429, 5xx and a missing
          answer are retried, five attempts by default; `Retry-After` is respected. Every other status fails the run.
        - The `Idempotency-Key` header is the run's id, the same on every attempt.
        - Only public addresses are reached, over https. `allow` names further networks (`["10.1.0.0/16"]`), which are
          reached over http as well.
        - Several secrets sign each request, so that one can replace another. `ca_file`: certificates to trust beside
          the system's.

        Raises `InvalidSetting`.
        """
        from headrace.core.endpoint import EndpointRefused
        from headrace.runtime.tasks.http_endpoint import RETRY, Endpoint

        target = Endpoint(url, secret, headers=headers, allow=allow, ca_file=ca_file)
        policy = RETRY if retry is None else retry
        if isinstance(policy, Retry):
            policy = dataclasses.replace(policy, give_up_on=(*policy.give_up_on, EndpointRefused))
        spec = TaskSpec(
            name=name,
            function=target.deliver,
            retry=policy,
            timeout_s=timeout_s,
            queue=queue,
            priority=priority,
            at_most_once=at_most_once,
        )
        self.registry.add(spec)
        self._endpoints.append(target)
        return AsyncTask(self, spec)

    # -- schedules

    @overload
    def schedule(
        self, cron: str, /, *, tz: str | None = None, name: str | None = None, catch_up: CatchUp = "once"
    ) -> Callable[[AnyTask], AnyTask]: ...
    @overload
    def schedule(
        self, *, every_s: float, name: str | None = None, catch_up: CatchUp = "once"
    ) -> Callable[[AnyTask], AnyTask]: ...
    @overload
    def schedule(
        self,
        task: AnyTask,
        cron: str | None = None,
        /,
        *,
        every_s: float | None = None,
        tz: str | None = None,
        name: str | None = None,
        catch_up: CatchUp = "once",
    ) -> AnyTask: ...
    @names_checked("app.schedule()")
    def schedule(
        self,
        *positional: Any,
        every_s: float | None = None,
        tz: str | None = None,
        name: str | None = None,
        catch_up: CatchUp = "once",
    ) -> Any:
        """Run a task at set times: `@app.schedule("30 6 * * MON-FRI", tz="Europe/Berlin")` above `@app.task`.

        - `every_s` instead of a cron expression is an interval in seconds.
        - Each tick is enqueued once, for any number of workers. `catch_up` decides about ticks that were missed
          while no worker ran: `once` runs the newest, `all` each of them (at most `schedule_ticks_max`), `skip` none.
        - `name`: default the task's name.

        A task of one datetime parameter gets the time of the tick in that time zone; every task can read it from
        `Context.scheduled_us`. Raises `InvalidSetting`.
        """
        from headrace.runtime.tasks.schedule_spec import make_schedule

        def register(task: Any, cron: str | None) -> Any:
            if not isinstance(task, Task) or task.app is not self:
                raise InvalidSetting(
                    f"app.schedule() expected a task of this app, got {task!r}",
                    hint="write @app.schedule(…) above @app.task",
                )
            check_name("app", self.name)
            self.registry.add_schedule(make_schedule(task.spec, cron, every_s, tz, name, catch_up))
            return task

        if positional and not isinstance(positional[0], str):
            return register(positional[0], *positional[1:] or (None,))
        return lambda task: register(task, *positional or (None,))

    # -- indexers

    @names_checked("app.indexer()")
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
        """Make an indexer: handlers turn ordered events of `source` into rows of `entities`.

        - `source`: one source, or several by name, merged by time.
        - `history`: how many of the newest events can be rolled back, or "all".
        - `where="drain"` waits for commits in flight before each query; the default answers from staged rows too.
        - `defer_indexes`: build SQL indexes at the first query that needs them, or when the sources end.
        - `preload=False`: never run handlers ahead of their turn to collect their reads.
        - `unknown="skip"`: skip kinds of events that have no handler, instead of stopping.
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

    # -- opening and closing

    def use(self, settings: Settings) -> None:
        """Replace the app's settings. Raises `InvalidSetting` when the app is open already."""
        if self._engine is not None:
            raise InvalidSetting("the app is open already", hint="call use() before the first use of the app")
        self._settings = settings

    @property
    def settings(self) -> Settings:
        """The effective settings."""
        if self._settings is None:
            self._settings = load({}, os.environ, Path.cwd(), code=self.declared)
        return self._settings

    @property
    def _owner(self) -> OwnerLoop:
        return self.owner_loop

    @on_owner_loop
    async def open(self) -> Engine:
        """Open the store, once; every other method does it when needed."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            await self._move_to(loop)
        if self._was_lent_in_parent:
            raise InvalidSetting(
                "the app is in testing mode in the parent process, and its store can't be used after a fork",
                hint="start the process with the method 'spawn', or test its code in this process",
            )
        assert self._opening is not None
        async with self._opening:
            if self._engine is None:
                self._engine = await open_engine(self.settings)
            return self._engine

    async def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Continue on this loop, after `asyncio.run` ended another one without a `close`."""
        self._loop, self._opening = loop, asyncio.Lock()
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.abandon()
        if self._engine is not None and not self._engine.is_lent:
            engine, self._engine = self._engine, None
            await engine.close()

    def _begin_anew(self) -> object:
        """Forget the engine in a forked child, and return what belongs to the parent."""
        left = (self._engine, self._producer, self._loop, self._opening)
        self._was_lent_in_parent = self._engine is not None and self._engine.is_lent
        self._engine = self._producer = self._loop = self._opening = None
        return left

    def use_engine(self, engine: Engine) -> None:
        """Use an engine that the caller opened on the running loop and will close (the testing mode).

        Raises `InvalidSetting` if the app is open already.
        """
        if self._engine not in (None, engine) or not self.owner_loop.claim():
            raise InvalidSetting("the app is open already", hint="close the app before it is put in testing mode")
        engine.is_lent = True
        self._engine = engine

    @on_owner_loop
    async def producer(self) -> Producer:
        """Return the producer of this process, which enqueues and maps. Use it on the loop of the app."""
        engine = await self.open()
        if self._producer is None:
            self._producer = Producer(engine)
        return self._producer

    @on_owner_loop
    async def activate(self, *messages: bytes) -> IntakeResult:
        """Store activations for the task broker's workers, each a `TaskActivation` in protobuf, once by its id.

        The answer lists those that were refused, with reasons; the others are stored.
        """
        try:
            from headrace.grpc.taskbroker.activation_intake import ActivationIntake
        except ModuleNotFoundError as error:
            raise InvalidSetting(
                f"activations require the package {error.name}", hint="pip install 'headrace[grpc]'"
            ) from None
        return await ActivationIntake(await self.open(), await self.producer()).take_all(messages)

    async def close(self) -> None:
        """Write pending runs and close the store. A second call does nothing."""
        await self._close()
        if self.owner_loop.has_background:
            await asyncio.to_thread(self.owner_loop.stop_background)

    @on_owner_loop
    async def _close(self) -> None:
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            await self._move_to(asyncio.get_running_loop())
        producer, self._producer = self._producer, None
        try:
            if producer is not None:
                await producer.close()
        finally:
            engine, self._engine = self._engine, None
            self._loop = self._opening = None
            for endpoint in self._endpoints:
                await endpoint.close()
            if engine is not None:
                await engine.close()
            self.owner_loop.release()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @names_checked("app.worker()")
    @asynccontextmanager
    async def worker(
        self,
        *,
        tasks: Sequence[str] | None = None,
        queues: Sequence[str] | None = None,
        concurrency: int | None = None,
        processes: int | None = None,
    ) -> AsyncGenerator[Worker, None]:
        """Run this app's tasks in this process while the block lasts; at its end, running tasks may finish.

        `tasks` and `queues` limit the worker to those; a worker with `tasks` does not run the app's schedules.
        `concurrency` and `processes` override the settings. Raises `InvalidInput` or `InvalidSetting` for a value that
        does not fit.
        """
        check_is_list("tasks", tasks)
        check_is_list("queues", queues)
        check_overrides("app.worker()", {"concurrency": concurrency, "processes": processes})
        if not self.owner_loop.claim():
            raise InvalidSetting(
                "app.worker() can't start on this event loop: the app is open on another event loop",
                hint="start the worker before the first _sync call of the process, or call `await app.close()` before",
            )
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
            settings=settings.given,
        )
        await worker.start()
        try:
            yield worker
        finally:
            await worker.stop()

    # -- runs and batches

    @on_owner_loop
    async def get_batch(self, batch_id: str) -> Batch[Any]:
        """Return a handle on a batch by its id. Raises `NotFound`."""
        engine = await self.open()
        batch, _ = await engine.store.batch(check_batch_id(batch_id))
        return Batch(self, engine, batch_id, self._result_of(batch.task))

    @on_owner_loop
    async def get_run(self, run_id: str) -> Run[Any]:
        """Return a handle on a run by its id. Raises `NotFound`."""
        engine = await self.open()
        batch_id, index = parse_run_id(run_id)
        record = await engine.store.run(batch_id, index)
        return Run(self, engine, batch_id, index, self._result_of(record.task))

    @on_owner_loop
    async def batches(self, *, state: str | None = None, limit: int = 50) -> list[BatchView]:
        """List batches, newest first. `state`: open, sealed, completed, cancelled or abandoned."""
        if state is not None:
            check_batch_state(state)
        engine = await self.open()
        states = None if state is None else [state]
        rows = await listed_batches(engine.store, engine.environment, states=states, limit=limit)
        return [batch_view(*row) for row in rows]

    @on_owner_loop
    async def runs(
        self, *, batch: str = "", state: str = "", task: str = "", queue: str = "", tag: str = "", limit: int = 50
    ) -> list[RunView]:
        """List runs, of the newest batch first and by index inside a batch; without inputs and outputs.

        `batch` is a batch id. `state` is waiting, delayed,
        leased, started (runs of a task with `at_most_once`), completed, failed, cancelled or expired.
        """
        check_run_state(state)
        engine = await self.open()
        records = await listed_runs(
            engine.store,
            engine.environment,
            batch_id=check_batch_id(batch) if batch else "",
            state=state,
            task=task,
            queue=queue,
            tag=tag,
            limit=limit,
        )
        return await listed_views(engine, records)

    get_batch_sync = blocking(get_batch)
    get_run_sync = blocking(get_run)
    batches_sync = blocking(batches)
    runs_sync = blocking(runs)

    def _result_of(self, task: str) -> ResultOf:
        return self.registry.get(task).codec.result_of if task in self.registry else PLAIN

    # -- for code that is not async

    def run_sync(self, awaitable: Awaitable[T]) -> T:
        """Await something from code that is not async: `app.run_sync(outline.map(items))`.

        It runs on the event loop of the app, in that loop's thread; an app that is not open gets a background loop.
        Raises `InvalidInput` inside a running event loop.
        """
        try:
            refuse_in_loop("run_sync()", "await … instead of app.run_sync(…)")
        except InvalidInput:
            close_unused(awaitable)
            raise
        return self.owner_loop.run(awaitable)

    def iter_sync(self, iterator: AsyncIterator[T]) -> Iterator[T]:
        """Iterate over an async iterator from code that is not async."""
        return iterate(self.owner_loop, iterator)

    @contextmanager
    def within_sync(self, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Enter an async context manager from code that is not async: `with app.within_sync(app.worker()): …`."""
        entered = self.run_sync(context.__aenter__())
        try:
            yield entered
        except BaseException as error:
            if not self.run_sync(context.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self.run_sync(context.__aexit__(None, None, None))

    def close_sync(self) -> None:
        """Close the app and end its background event loop. Raises `InvalidInput` inside a running event loop."""
        refuse_in_loop("close_sync()", "await app.close()")
        try:
            if self._engine is not None:
                self.owner_loop.run(self._close())
        finally:
            self.owner_loop.stop_background()
