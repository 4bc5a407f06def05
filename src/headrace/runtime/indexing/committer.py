"""The committer: it writes staged batches, one commit at a time, in order, in a thread of its own.

R18 (heartbeats and the committer have threads of their own): handlers may block their event loop for seconds. The
committer has its own thread, loop and connection, so commits and the lease's heartbeats do not wait for Python code of
handlers. A memory store belongs to one loop; with it the committer is a task.

The batches that wait when a commit begins join it, up to half of the allowed depth: a slow database gets fewer and
larger transactions, while handlers continue. A retryable error repeats the whole commit; the guard of the commit
detects one that had been written after all. Any other error ends the committer: nothing after it is written, and
`on_failed` is called at once, even if no caller waits for a commit.
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

from headrace.core.block import Coalescer, Extra
from headrace.core.entity import EntityType
from headrace.core.pack import JSON, REFERENCE
from headrace.core.sequencer import Position
from headrace.core.staging import Staged, merged
from headrace.foundation.errors import StoreUnavailable
from headrace.foundation.ids import new_batch_id
from headrace.foundation.logs import get_logger
from headrace.runtime.engine import Engine
from headrace.runtime.indexing.handler_context import EnqueueRequest
from headrace.runtime.retrying import retry_transient
from headrace.store.entities.protocol import Commit, Enqueued, EntityPlan, EntityStore, LeaseLost, Write

T = TypeVar("T")

LOG: Any = get_logger("headrace.indexer")
KEY_CHARS_MAX: Final = 200
CLOSE_S: Final = 30


class StagedBatch(NamedTuple):
    """The rows and requests that the handlers of consecutive events left to be committed."""

    staged: Staged
    old_no: int
    no: int
    positions: dict[str, Position]
    checkpoints: list[tuple[int, str, Position]]
    requests: list[EnqueueRequest]
    floor_no: int | None = None
    is_caught_up: bool = False


class CommittedBatch(NamedTuple):
    """The result of one commit: how many batches it held, what it wrote, and its duration."""

    batches_count: int
    no: int
    rows_count: int
    runs_count: int
    seconds: float


class Committer:
    """Commits the batches of one indexer under one lease; calls `on_landed` and `on_failed` on the owner's loop."""

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
        """`busy` returns the number of the event whose handler runs; `stuck` the error of a handler that blocks the
        owner's loop.

        Both are called from the committer's own thread.
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
        self._owner_loop = asyncio.get_running_loop()
        self._loop = self._owner_loop
        self._waiting: deque[StagedBatch] = deque()
        # The batches of a commit count as waiting until it is written. If one commit took all of them, handlers would
        # stop during that commit, and the committer after it.
        self._merged_max = max(engine.limits.index_depth_max // 2, 1)
        self._wake = asyncio.Event()
        self._is_closing = False
        self._ended: asyncio.Future[None] = self._owner_loop.create_future()
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._one_at_a_time = asyncio.Lock()
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Start, in a thread if the store allows it."""
        if not self._store.works_beside:
            self._task = asyncio.ensure_future(self._main())
            return
        self._thread = threading.Thread(target=self._run, name="headrace-committer", daemon=True)
        self._thread.start()
        self._started.wait()

    def put(self, batch: StagedBatch) -> None:
        """Accept a batch; called on the owner's loop, in order."""
        self._waiting.append(batch)
        self._call(self._wake.set)

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run a store operation where commits run, and not during one. Raises the error that ended the committer."""
        if self.failure is not None:
            raise self.failure
        if self._loop is self._owner_loop:
            return await self._exclusively(work)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._exclusively(work), self._loop))

    async def _exclusively(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._one_at_a_time:
            return await work()

    async def close(self, *, now: bool = False) -> None:
        """Commit the waiting batches (not if `now`) and release the lease."""
        if now:
            self._waiting.clear()
        self._is_closing = True
        self._call(self._wake.set)
        if now and self.failure is None:  # otherwise it is ending already
            self._call(self._cancel)
        if self._task is None and self._thread is None:
            return
        await asyncio.wait([self._ended], timeout=CLOSE_S)
        if self._thread is not None and self._ended.done():
            await asyncio.to_thread(self._thread.join)

    def _call(self, call: Callable[[], object]) -> None:
        if self._loop is self._owner_loop:
            call()
        else:
            with suppress(RuntimeError):  # its loop has ended
                self._loop.call_soon_threadsafe(call)

    def _call_owner(self, call: Callable[..., None], *args: Any) -> None:
        if self._loop is self._owner_loop:
            call(*args)
        else:
            with suppress(RuntimeError):  # the owner's loop has ended
                self._owner_loop.call_soon_threadsafe(call, *args)

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
        heartbeat_task = asyncio.ensure_future(self._heartbeat()) if self._store.works_beside else None
        try:
            await self._work()
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - any failure stops the indexer at once
            self._fail(error)
        finally:
            if heartbeat_task is not None:
                heartbeat_task.cancel()
            try:
                if not isinstance(self.failure, LeaseLost):
                    await self._store.leave(self._plan.environment, self._plan.indexer, self._token)
            except Exception as error:  # noqa: BLE001 - a lease that can't be released lapses
                self.failure = self.failure or error
            finally:
                self._call_owner(self._end)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._waiting.clear()
        self._call_owner(self._on_failed, error)

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
        commit = await self._build_commit(batches)
        clock, limits = self._engine.clock, self._engine.limits
        now_us = clock.now_us()
        await retry_transient(
            lambda: self._store.commit(commit, now_us=now_us),
            clock,
            what=f"the commit of indexer {self._plan.indexer}",
            waits_max=limits.index_retries_max,
            outage=self._engine.outage,
        )
        rows_count = sum(len(write.rows) + len(write.deleted) + len(write.changes) for write in commit.writes)
        runs_count = 0 if commit.enqueued is None else sum(chunk.runs_count for chunk in commit.enqueued.chunks)
        committed = CommittedBatch(len(batches), commit.no, rows_count, runs_count, perf_counter() - started)
        self._call_owner(self._on_landed, committed)

    async def _build_commit(self, batches: Sequence[StagedBatch]) -> Commit:
        """Merge batches into one commit."""
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
            checkpoints=[checkpoint for batch in batches for checkpoint in batch.checkpoints],
            enqueued=await self._build_chunks([requests for batch in batches for requests in batch.requests]),
            floor_no=max(floors) if floors else None,
            is_caught_up=batches[-1].is_caught_up,
        )

    async def _build_chunks(self, requests: Sequence[EnqueueRequest]) -> Enqueued | None:
        """Build the chunks of the enqueued runs, as a batch of their own, each run keyed by position and ordinal."""
        if not requests:
            return None
        limits = self._engine.limits
        batch_id = new_batch_id(self._engine.clock.now_us())
        coalescer = Coalescer(runs_max=limits.chunk_runs_max, bytes_max=limits.chunk_bytes_max)
        for index, request in enumerate(requests):
            extra = msgspec.structs.replace(request.extra or Extra(), idempotency_key=self._key_of(request))
            payload, kind = request.payload, JSON
            if len(payload) >= limits.inline_bytes_max:
                full_payload = payload
                payload, object_key = await self._engine.offloaded(batch_id, full_payload)
                extra = msgspec.structs.replace(extra, object_key=object_key, object_bytes=len(full_payload))
                kind = REFERENCE
            coalescer.add(index, payload, request.key, kind=kind, extra=extra)
        return Enqueued(batch_id, coalescer.flush())

    def _key_of(self, request: EnqueueRequest) -> str:
        text = msgspec.json.encode([self._plan.indexer, request.source, request.position, request.ordinal]).decode()
        return text if len(text) <= KEY_CHARS_MAX else hashlib.sha256(text.encode()).hexdigest()

    async def _heartbeat(self) -> None:
        """Send heartbeats between commits and during long ones; a commit counts as a heartbeat too."""
        clock, limits = self._engine.clock, self._engine.limits
        wake = asyncio.Event()
        while True:
            wake.clear()
            with self._engine.outage.waking(wake):
                is_woken = await clock.wait_for(wake, limits.heartbeat_ms / 1_000)
            if not is_woken and self._is_owner_blocked():
                self._cancel()
                return
            with suppress(StoreUnavailable):
                if not await self._store.beat(self._plan.environment, self._plan.indexer, self._token):
                    self._fail(
                        LeaseLost(
                            f"another process has taken over the indexer {self._plan.indexer!r}",
                            hint="this process sent no heartbeat for longer than session_timeout_ms",
                            indexer=self._plan.indexer,
                        )
                    )
                    self._cancel()
                    return

    def _is_owner_blocked(self) -> bool:
        """True if one handler has blocked the owner's loop for longer than allowed.

        Counted in heartbeats that the loop did not answer, so that a process that was suspended is not blamed. The
        lease is released, and the process that takes it continues from the last commit.
        """
        limits, busy_no = self._engine.limits, self._busy()
        if busy_no != self._busy_no:
            self._busy_no, self._unanswered_count = busy_no, 0
        is_late = self._unanswered_count * limits.heartbeat_ms >= limits.index_handler_timeout_s * 1_000
        stuck = self._stuck() if is_late else None
        if stuck is not None:
            LOG.error("handler.blocks_loop", indexer=self._plan.indexer, error=str(stuck))
            self._fail(stuck)
            return True
        self._unanswered_count += 1
        self._call_owner(self._answer)
        return False

    def _answer(self) -> None:
        self._unanswered_count = 0


def write_of(entity: EntityType, delta: dict[Any, Any], changes: dict[tuple[Any, int], Any]) -> Write:
    """Return one table's part of a commit."""
    rows = [row for row in delta.values() if row is not None]
    deleted = [row_id for row_id, row in delta.items() if row is None] if len(rows) < len(delta) else []
    return Write(entity, rows, deleted, [(row_id, no, row) for (row_id, no), row in changes.items()])
