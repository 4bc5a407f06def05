"""What makes staged batches durable: one commit at a time, in order, in a thread of its own.

Rule R18: handlers may keep their loop busy for seconds; the committer has its own thread, loop and connection, so a
commit and the lease's sign of life wait for nobody's Python. (A store in memory belongs to one loop: there it is a
task.)

What waits when a commit begins goes into it, up to half of what may wait: a slow database gets fewer and larger
transactions, and handlers go on under each. An error that trying again can help is tried again, whole: the guard of the
commit tells one that had landed after all. Any other ends the committer; nothing after it is written, and `on_failed`
is called at once, also when nobody waits for a commit.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import structlog

from headrace.core.block import Coalescer, Extra
from headrace.core.entity import EntityType
from headrace.core.pack import JSON, REFERENCE
from headrace.core.sequencer import Position
from headrace.core.staging import Staged, merged
from headrace.foundation.errors import StoreUnavailable
from headrace.foundation.ids import new_batch_id
from headrace.runtime.engine import Engine
from headrace.runtime.indexing.handler_context import EnqueueRequest
from headrace.runtime.retrying import retry_transient
from headrace.store.entities.protocol import Commit, Enqueued, EntityPlan, EntityStore, LeaseLost, Write

T = TypeVar("T")

LOG: Any = structlog.get_logger("headrace.indexer")
KEY_CHARS_MAX: Final = 200
CLOSE_S: Final = 30


class StagedBatch(NamedTuple):
    """What the handlers of some consecutive events left to be committed."""

    staged: Staged
    old_no: int
    no: int
    positions: dict[str, Position]
    checkpoints: list[tuple[int, str, Position]]
    asked: list[EnqueueRequest]
    floor_no: int | None = None
    is_caught_up: bool = False


class CommittedBatch(NamedTuple):
    """News of one commit: how many batches it held, what it wrote and what it took."""

    batches_count: int
    no: int
    rows_count: int
    runs_count: int
    seconds: float


class Committer:
    """Commits the batches of one indexer under one lease; tells `on_landed` and `on_failed` on the owner's loop."""

    def __init__(
        self,
        engine: Engine,
        store: EntityStore,
        plan: EntityPlan,
        token: int,
        *,
        on_landed: Callable[[CommittedBatch], None],
        on_failed: Callable[[BaseException], None],
        busy: Callable[[], int | None],
        stuck: Callable[[], BaseException | None],
    ) -> None:
        """`busy`: the number of the event whose handler runs; `stuck`: the error of one that keeps the owner's loop.

        Both are asked for from the committer's own thread.
        """
        self._engine = engine
        self._store = store
        self._plan = plan
        self._token = token
        self._on_landed = on_landed
        self._on_failed = on_failed
        self._busy = busy
        self._stuck = stuck
        self._busy_no: int | None = None
        self._unanswered_count = 0
        self._home = asyncio.get_running_loop()
        self._loop = self._home
        self._waiting: deque[StagedBatch] = deque()
        # What one commit holds counts as waiting until it has landed: with all of it in one, handlers would stand still
        # under that commit, and the committer after it.
        self._merged_max = max(engine.limits.index_depth_max // 2, 1)
        self._wake = asyncio.Event()
        self._is_closing = False
        self._ended: asyncio.Future[None] = self._home.create_future()
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._one_at_a_time = asyncio.Lock()
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin, in a thread where the store allows it."""
        if not self._store.works_beside:
            self._task = asyncio.ensure_future(self._main())
            return
        self._thread = threading.Thread(target=self._run, name="headrace-committer", daemon=True)
        self._thread.start()
        self._started.wait()

    def put(self, batch: StagedBatch) -> None:
        """Take a batch; from the owner's loop, in order."""
        self._waiting.append(batch)
        self._call(self._wake.set)

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run something of the store's where commits run, and not while one does. Raises what ended the committer."""
        if self.failure is not None:
            raise self.failure
        if self._loop is self._home:
            return await self._alone(work)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._alone(work), self._loop))

    async def _alone(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._one_at_a_time:
            return await work()

    async def close(self, *, now: bool = False) -> None:
        """Commit what waits (not when `now`) and give the lease back."""
        if now:
            self._waiting.clear()
        self._is_closing = True
        self._call(self._wake.set)
        if now and self.failure is None:  # else it is ending by itself
            self._call(self._cancel)
        if self._task is None and self._thread is None:
            return
        await asyncio.wait([self._ended], timeout=CLOSE_S)
        if self._thread is not None and self._ended.done():
            await asyncio.to_thread(self._thread.join)

    def _call(self, call: Callable[[], object]) -> None:
        if self._loop is self._home:
            call()
        else:
            with suppress(RuntimeError):  # its loop has ended
                self._loop.call_soon_threadsafe(call)

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        if self._loop is self._home:
            call(*args)
        else:
            with suppress(RuntimeError):  # the owner's loop has ended: nobody is left to tell
                self._home.call_soon_threadsafe(call, *args)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._wake = asyncio.Event()
            self._one_at_a_time = asyncio.Lock()
            self._task = asyncio.current_task()
            self._started.set()
            await self._main()

        with suppress(asyncio.CancelledError):
            asyncio.run(main())

    async def _main(self) -> None:
        beating = asyncio.ensure_future(self._beat()) if self._store.works_beside else None
        try:
            await self._work()
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the owner is told at once
            self._fail(error)
        finally:
            if beating is not None:
                beating.cancel()
            try:
                if not isinstance(self.failure, LeaseLost):
                    await self._store.leave(self._plan.environment, self._plan.indexer, self._token)
            except Exception as error:  # noqa: BLE001 - a lease that can't be given back lapses
                self.failure = self.failure or error
            finally:
                self._tell(self._end)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._waiting.clear()
        self._tell(self._on_failed, error)

    async def _work(self) -> None:
        while True:
            if not self._waiting:
                if self._is_closing:
                    return
                self._wake.clear()
                if not self._waiting and not self._is_closing:
                    await self._wake.wait()
                continue
            batches = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._merged_max))]
            async with self._one_at_a_time:
                await self._commit(batches)

    async def _commit(self, batches: Sequence[StagedBatch]) -> None:
        started = perf_counter()
        commit = await self._made(batches)
        clock, limits = self._engine.clock, self._engine.limits
        now_us = clock.now_us()
        await retry_transient(
            lambda: self._store.commit(commit, now_us=now_us),
            clock,
            what=f"the commit of indexer {self._plan.indexer}",
            waits_max=limits.index_retries_max,
        )
        rows_count = sum(len(write.rows) + len(write.deleted) + len(write.changes) for write in commit.writes)
        runs_count = 0 if commit.enqueued is None else sum(chunk.runs_count for chunk in commit.enqueued.chunks)
        landed = CommittedBatch(len(batches), commit.no, rows_count, runs_count, perf_counter() - started)
        self._tell(self._on_landed, landed)

    async def _made(self, batches: Sequence[StagedBatch]) -> Commit:
        """Some batches as one commit."""
        whole = merged([batch.staged for batch in batches])
        floors = [batch.floor_no for batch in batches if batch.floor_no is not None]
        return Commit(
            plan=self._plan,
            token=self._token,
            old_no=batches[0].old_no,
            no=batches[-1].no,
            positions=batches[-1].positions,
            writes=[
                write_of(entity, delta, changes)
                for entity, delta, changes in zip(self._plan.entities, whole.deltas, whole.changes, strict=True)
                if delta
            ],
            checkpoints=[own for batch in batches for own in batch.checkpoints],
            enqueued=await self._enqueued([asked for batch in batches for asked in batch.asked]),
            floor_no=max(floors) if floors else None,
            is_caught_up=batches[-1].is_caught_up,
        )

    async def _enqueued(self, asked: Sequence[EnqueueRequest]) -> Enqueued | None:
        """Runs as chunks of a batch of their own, each known by position and ordinal."""
        if not asked:
            return None
        limits = self._engine.limits
        batch_id = new_batch_id(self._engine.clock.now_us())
        coalescer = Coalescer(runs_max=limits.chunk_runs_max, bytes_max=limits.chunk_bytes_max)
        for index, one in enumerate(asked):
            extra = msgspec.structs.replace(one.extra or Extra(), idempotency_key=self._key_of(one))
            payload, kind = one.payload, JSON
            if len(payload) >= limits.inline_bytes_max:
                whole = payload
                payload, object_key = await self._engine.offloaded(batch_id, whole)
                extra = msgspec.structs.replace(extra, object_key=object_key, object_bytes=len(whole))
                kind = REFERENCE
            coalescer.add(index, payload, one.key, kind=kind, extra=extra)
        return Enqueued(batch_id, coalescer.flush())

    def _key_of(self, asked: EnqueueRequest) -> str:
        text = msgspec.json.encode([self._plan.indexer, asked.source, asked.position, asked.ordinal]).decode()
        return text if len(text) <= KEY_CHARS_MAX else hashlib.sha256(text.encode()).hexdigest()

    async def _beat(self) -> None:
        """Signs of life, in between commits and beside long ones; a commit that lands is one too."""
        clock, limits = self._engine.clock, self._engine.limits
        while True:
            await clock.sleep(limits.heartbeat_ms / 1_000)
            if self._is_home_stuck():
                self._cancel()
                return
            with suppress(StoreUnavailable):
                if not await self._store.beat(self._plan.environment, self._plan.indexer, self._token):
                    self._fail(
                        LeaseLost(
                            f"another process works on the indexer {self._plan.indexer!r} now",
                            hint="this one was silent for longer than session_timeout_ms",
                            indexer=self._plan.indexer,
                        )
                    )
                    self._cancel()
                    return

    def _is_home_stuck(self) -> bool:
        """Whether one handler has kept the owner's loop for as long as it may wait: then nobody there can say so.

        Counted in beats that the loop did not answer, so that a process that was stopped for a while is not blamed.
        The lease is given back, and whoever takes it goes on from the last commit.
        """
        limits, busy_no = self._engine.limits, self._busy()
        if busy_no != self._busy_no:
            self._busy_no, self._unanswered_count = busy_no, 0
        is_late = self._unanswered_count * limits.heartbeat_ms >= limits.index_handler_timeout_s * 1_000
        stuck = self._stuck() if is_late else None
        if stuck is not None:
            LOG.error("a handler keeps the loop", indexer=self._plan.indexer, error=str(stuck))
            self._fail(stuck)
            return True
        self._unanswered_count += 1
        self._tell(self._answer)
        return False

    def _answer(self) -> None:
        self._unanswered_count = 0


def write_of(entity: EntityType, delta: dict[Any, Any], changes: dict[tuple[Any, int], Any]) -> Write:
    """One table's part of a commit."""
    rows = [row for row in delta.values() if row is not None]
    deleted = [row_id for row_id, row in delta.items() if row is None] if len(rows) < len(delta) else []
    return Write(entity, rows, deleted, [(row_id, no, row) for (row_id, no), row in changes.items()])
