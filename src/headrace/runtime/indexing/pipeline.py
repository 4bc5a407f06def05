"""A running indexer: three loops that fetch, compute and commit, and wait for each other only at bounded queues.

Handlers run strictly in order, one at a time, over staged rows. The rows that a batch of handlers wrote go to the
committer, and the next batch begins. It waits while `index_depth_max` batches wait for their commit, and while memory
is full of uncommitted rows. The end of one loop ends all: the error of a commit is raised at once to every waiting
caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

from headrace.core.sequencer import Position, Sequenced, is_after
from headrace.core.sizes import Sizes
from headrace.core.staging import StagedTable, Staging
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.foundation.limits import MIB
from headrace.foundation.logs import get_logger
from headrace.runtime.clock import Timer
from headrace.runtime.engine import Engine
from headrace.runtime.indexing.committer import CommittedBatch, Committer, StagedBatch
from headrace.runtime.indexing.definition import ALL, IndexerDefinition, IndexerProgress
from headrace.runtime.indexing.effects import EffectResult, Effects
from headrace.runtime.indexing.handler_context import HandlerContext, HandlerScope
from headrace.runtime.indexing.handler_registry import HandlerFailed
from headrace.runtime.indexing.indexer_lease import lease
from headrace.runtime.indexing.read_coalescer import ReadCoalescer
from headrace.runtime.indexing.source_reader import SourceReader
from headrace.runtime.indexing.speculative_reads import SpeculativeReads
from headrace.runtime.retrying import retry_transient
from headrace.runtime.tasks.exception_info import error_line
from headrace.store.entities.protocol import EntityStore, IndexerState

LOG: Any = get_logger("headrace.indexer")
YIELD_S: Final = 0.002
"""R18 (the loop is yielded every 2 ms): how long handlers run before other tasks get a rewind."""
CHECK_EVENTS: Final = 64
"""Events between two checks of the time and of memory."""
WINDOW: Final = 1_024
WINDOW_MIN: Final = 64
DENSE_SHARE: Final = 16
"""Number of events whose handlers run ahead of a read that misses memory: at first, at least, and how many of them per
missed row.
"""


class IndexerPipeline:
    """One run of an indexer on one event loop: `start`, `run`, `close`."""

    def __init__(self, definition: IndexerDefinition, engine: Engine, store: EntityStore) -> None:
        self.definition = definition
        self.engine = engine
        self.progress = IndexerProgress()
        self._store = store
        self._limits = engine.limits
        self.plan = definition.plan(engine.environment, engine.limits)
        keeps = [entity.table for entity in self.plan.entities if self.plan.keeps_history(entity)]
        self.staging = Staging(self.plan.entities, keeps_history=keeps)
        self._reads = ReadCoalescer(
            self.staging, store, engine.clock, retries_max=self._limits.index_retries_max, outage=engine.outage
        )
        self._reads.before_query = self._load_ahead
        if definition.where == "drain":
            self._reads.settle_first = self.flush
        if definition.defer_indexes:
            self._reads.before_where = self._ensure_index
        effects = Effects(
            self.staging,
            self.staging.by_class.get(EffectResult),
            self._reads,
            engine.clock,
            calls_max=self._limits.index_effects_max,
        )
        self._effects = effects
        self._scope = HandlerScope(definition.name, self.staging, self._reads, effects, engine.clock, engine.limits)
        definition.handlers.build_decoders()
        self._changed = asyncio.Event()
        self._commit_landed = asyncio.Event()
        self._source_reader = SourceReader(
            definition.sources, waiting_max=self._limits.index_fetch_events_max, on_change=self._changed.set
        )
        self._committer: Committer | None = None
        self._failure: BaseException | None = None
        self._running: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._watch_timer: Timer | None = None
        self._watched_no = -1
        self._token = 0
        self._event_no = 0
        self._floor_no = 0
        self._is_caught_up = False
        self._positions: dict[str, Position] = {}
        self._batch: Sequenced | None = None
        self._events: list[Any] = []
        self._event_offset = 0
        self._handling = False
        self._speculative: SpeculativeReads | None = None
        self._ahead_offset = 0
        self._window = WINDOW
        self._built_indexes: set[tuple[str, str]] = set()

    # -- start and stop

    async def start(self, *, wait: bool = True, on_waiting: Callable[[str], None] | None = None) -> IndexerState:
        """Create the tables, take the lease, and continue after the last commit."""
        state = await self._retry(lambda: self._store.prepare(self.plan))
        state, token = await lease(self._store, self.engine, state, wait=wait, on_waiting=on_waiting)
        self._resume_from(state)
        self._committer = Committer(
            self.engine, self._store, self.plan, token,
            on_landed=self._on_committed, on_failed=self.fail,
            busy=lambda: self._event_no if self._handling else None, stuck=self._stuck_handler,
        )  # fmt: skip
        self._token = token
        self._committer.start()
        return state

    async def run(self, *, until: Position | None = None) -> IndexerProgress:
        """Index until the sources end, `until` was reached, or `stop` was called. Raises the error that ended it
        otherwise.

        After a run has ended, another may follow, which reads the sources on.
        """
        if self._failure is not None:
            raise self._failure
        if self._running is not None:
            raise InvalidInput(
                f"the indexer {self.definition.name!r} is already running",
                hint="await the current run instead of starting another",
            )
        if until is not None and len(self._source_reader.names) != 1:
            raise InvalidInput(
                f"until: expected an indexer with one source, got {len(self._source_reader.names)} sources"
            )
        self._is_stopping = False
        self._running = asyncio.ensure_future(self._main(until))
        try:
            await self._running
        except asyncio.CancelledError:
            if self._failure is None:
                self._running.cancel()
                raise
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self._running = None
            await self._source_reader.close()
        if self._failure is not None:
            raise self._failure
        return self._current_progress()

    def stop(self) -> None:
        """Begin no further batch; `run` returns when everything staged is committed."""
        self._is_stopping = True
        self._changed.set()
        self._commit_landed.set()

    def fail(self, error: BaseException) -> None:
        """End all loops with this error; the first one counts."""
        if self._failure is not None:
            return
        self._failure = error
        self._reads.fail(error)
        self._changed.set()
        self._commit_landed.set()
        if self._running is not None and self._running is not asyncio.current_task():
            self._running.cancel()

    async def close(self) -> None:
        """Commit what is staged (after a failure nothing) and release the lease. May be called twice."""
        if self._watch_timer is not None:
            self._watch_timer.cancel()
            self._watch_timer = None
        await self._source_reader.close()
        await self._effects.close()
        committer, self._committer = self._committer, None
        if committer is not None:
            await committer.close(now=self._failure is not None)
        await self._reads.close()

    async def flush(self) -> None:
        """Return when everything passed to the committer is durable. Raises the error that ended the indexer."""
        while self.staging.pending_count and self._failure is None:
            self._commit_landed.clear()
            await self._commit_landed.wait()
        if self._failure is not None:
            raise self._failure

    async def rollback(self, to: Position | None, *, source: str | None = None) -> IndexerState:
        """Commit everything staged, then go back to the last event at or before a position; None is before the first
        event.
        """
        name = self._source_reader.names[0] if source is None else source
        if name not in self._source_reader.names or (source is None and len(self._source_reader.names) > 1):
            names = ", ".join(self._source_reader.names)
            raise InvalidInput(f"rollback: expected the name of a source, got {source!r}", hint=f"one of: {names}")
        await self.flush()
        committer = self._committer
        assert committer is not None
        state: IndexerState = await committer.run(
            lambda: self._retry(
                lambda: self._store.rollback(self.plan, self._token, old_no=self._event_no, source=name, to=to)
            )
        )
        self.staging.clear()
        self._resume_from(state)
        return state

    def progress_now(self) -> IndexerProgress:
        """Return the progress so far."""
        return self._current_progress()

    async def look_ahead(self) -> None:
        """Ask the sources for their newest positions, to show progress."""
        self.progress.heads = await self._source_reader.heads()

    def _current_progress(self) -> IndexerProgress:
        progress = self.progress
        progress.no, progress.positions = self._event_no, dict(self._positions)
        progress.query_s = self._reads.query_s
        progress.memory_bytes = self.staging.bytes
        return progress

    async def _retry(self, call: Callable[[], Any]) -> Any:
        return await retry_transient(
            call,
            self.engine.clock,
            what=f"indexer {self.definition.name}",
            waits_max=self._limits.index_retries_max,
            outage=self.engine.outage,
        )

    def _resume_from(self, state: IndexerState) -> None:
        unknown = set(state.positions) - set(self._source_reader.names)
        if unknown:
            raise InvalidSetting(
                f"the indexer {state.name!r} has a position in the source {min(unknown)!r}, which it no longer has",
                hint="give the source its former name, or run `headrace index reset`",
            )
        self._event_no, self._positions = state.no, dict(state.positions)
        self._floor_no, self._is_caught_up = state.floor_no, state.is_caught_up
        self.progress.committed_no = state.no

    # -- compute

    async def _main(self, until: Position | None) -> None:
        self._batch, self._events = None, []
        self._sizes = Sizes(self._limits.index_batch_events_max, is_even=not self._limits.index_depth_max)
        await self._source_reader.start(self._positions)
        if self._watch_timer is not None:
            self._watch_timer.cancel()
        self._watch_handlers()
        while not self._is_stopping:
            self._check()
            if self._is_between_batches and self._source_reader.rewind is not None:
                await self._follow_rewind()
                continue
            if self._is_between_batches and not self._take_batch(until):
                if self._source_reader.sequencer.is_over or self._is_reached(until):
                    break
                await self._wait(self._changed, "fetch_wait_s")
                continue
            await self._wait_for_capacity()
            if not self._must_stop:
                await self._compute()
        is_cut = until is not None and self._past_until(until)
        await self._finish(is_over=self._source_reader.sequencer.is_over and not self._must_stop and not is_cut)

    @property
    def _must_stop(self) -> bool:
        return self._is_stopping

    @property
    def _is_between_batches(self) -> bool:
        """True if no event is staged since the last commit began."""
        return self._batch is None

    def _check(self) -> None:
        failure = self._failure or self._source_reader.failure
        if failure is not None:
            raise failure

    def _take_batch(self, until: Position | None) -> bool:
        self._changed.clear()
        sequencer = self._source_reader.sequencer
        taken = sequencer.take(self._sizes.size(sequencer.left))
        if taken is None:
            return False
        self._sizes.grow()
        self._source_reader.events_taken()
        if until is not None:
            count = sum(1 for position in taken.positions if not is_after(position, until))
            if not count:
                return False
            taken = Sequenced(taken.positions[:count], taken.events[:count], taken.times, taken.sources)
        names = self._source_reader.names
        self._events = self.definition.handlers.decode_all(
            taken.events,
            taken.positions,
            names[0] if taken.sources is None else [names[position] for position in taken.sources],
        )
        self._batch, self._event_offset, self._ahead_offset = taken, 0, 0
        return True

    def _is_reached(self, until: Position | None) -> bool:
        if until is None:
            return False
        last = self._positions.get(self._source_reader.names[0])
        return self._past_until(until) or (last is not None and not is_after(until, last))

    def _past_until(self, until: Position) -> bool:
        """True if the events taken last came after `until`: then no event before it can follow."""
        last = self._source_reader.sequencer.last_taken
        return last is not None and is_after(last, until)

    async def _wait_for_capacity(self) -> None:
        """Wait while too many batches wait for their commit, or memory holds too many rows that can't be evicted
        yet.
        """
        depth = max(self._limits.index_depth_max, 1)
        bytes_max = self._limits.index_memory_mib * MIB
        while self.staging.pending_count >= depth and not self._must_stop:
            await self._wait(self._commit_landed, "commit_wait_s")
        if (
            self.staging.bytes > bytes_max
        ):  # rows that were loaded ahead may be evicted: they are loaded again, fewer at a time
            self._ahead_offset = 0
            self._window = max(self._window // 4, WINDOW_MIN)
        while self.staging.bytes > bytes_max and not self.staging.evict(bytes_max * 9 // 10):
            if not self.staging.pending_count or self._must_stop:
                return  # one batch alone exceeds the bound, and no commit would free memory
            await self._wait(self._commit_landed, "commit_wait_s")

    async def _wait(self, event: asyncio.Event, where: str) -> None:
        event.clear()
        self._check()
        if self._is_stopping:
            return
        started = perf_counter()
        await event.wait()
        setattr(self.progress, where, getattr(self.progress, where) + perf_counter() - started)
        self._check()

    async def _compute(self) -> None:
        """Run handlers in order until the batch has ended or memory is full, then cut the batch."""
        assert self._batch is not None
        old_no, first_at = self._event_no, self._event_offset
        started, waited_s = perf_counter(), self.progress.commit_wait_s
        try:
            await self._handle(self._batch)
        finally:
            if self._speculative is not None:
                preload, self._speculative = self._speculative, None
                await preload.end()
        self._effects.forget()
        self._scope.ahead.clear()
        self.progress.events_count += self._event_offset - first_at
        self.progress.compute_s += perf_counter() - started - (self.progress.commit_wait_s - waited_s)
        self._cut_batch(old_no, first_at)
        if not self._limits.index_depth_max:
            await self._wait_until_committed()

    async def _wait_until_committed(self) -> None:
        started = perf_counter()
        await self.flush()
        self.progress.commit_wait_s += perf_counter() - started

    async def _handle(self, batch: Sequenced) -> None:
        shared, names, handlers = self._scope, self._source_reader.names, self.definition.handlers
        positions, times, sources, events = batch.positions, batch.times, batch.sources, self._events
        handler_of, by_type, name = handlers.handler_of, handlers.by_type, names[0]
        bytes_max = self._limits.index_memory_mib * MIB
        turn_until = perf_counter() + YIELD_S
        self._handling = True
        try:
            for at in range(self._event_offset, len(events)):
                self._event_no += 1
                self._event_offset = at
                event = events[at]
                handler = by_type.get(type(event)) or handler_of(event)
                if handler is not None:
                    if sources is not None:
                        name = names[sources[at]]
                    time_us = None if times is None else times[at]
                    context = HandlerContext(shared, self._event_no, name, positions[at], time_us, event)
                    try:
                        await handler(event, context)
                    except Exception as error:
                        if self._failure is not None:
                            raise self._failure from None
                        raise self._handler_failed(error, name, positions[at]) from error
                    finally:
                        context.is_over = True
                if not at % CHECK_EVENTS:
                    self._check()
                    if perf_counter() > turn_until:
                        await asyncio.sleep(0)
                        turn_until = perf_counter() + YIELD_S
                    if shared.fault is not None:
                        raise shared.fault
                    if self.staging.bytes > bytes_max:
                        break
        finally:
            self._handling = False
        self._event_offset += 1
        if shared.fault is not None:
            raise shared.fault

    def _handler_failed(self, error: Exception, source: str, position: Position) -> HandlerFailed:
        return HandlerFailed(
            f"the handler of the event at {position!r} failed: {error_line(error)}",
            hint="nothing after the last commit was written; correct the handler and start the indexer again",
            indexer=self.definition.name,
            source=source,
            position=position,
        )

    def _cut_batch(self, old_no: int, first_at: int) -> None:
        """Pass the rows that the handlers wrote to the committer."""
        batch = self._batch
        assert batch is not None
        names = self._source_reader.names
        at = range(first_at, self._event_offset)
        if batch.sources is None:
            source_names = [names[0]] * len(at)
            self._positions = {names[0]: batch.positions[self._event_offset - 1]}
        else:
            source_names = [names[batch.sources[offset]] for offset in at]
            self._positions = self._positions | {
                name: batch.positions[offset] for name, offset in zip(source_names, at, strict=True)
            }
        checkpoints = []
        if self.plan.history:
            numbers = range(old_no + 1, self._event_no + 1)
            checkpoints = [
                (no, name, batch.positions[offset]) for no, name, offset in zip(numbers, source_names, at, strict=True)
            ]
        if self._event_offset == len(batch.positions):
            self._batch, self._events = None, []
        self._pass_to_committer(old_no, checkpoints)

    def _pass_to_committer(self, old_no: int, checkpoints: list[tuple[int, str, Position]]) -> None:
        enqueued, self._scope.enqueued = self._scope.enqueued, []
        assert self._committer is not None
        self._committer.put(
            StagedBatch(
                staged=self.staging.cut(),
                old_no=old_no,
                no=self._event_no,
                positions=self._positions,
                checkpoints=checkpoints,
                requests=enqueued,
                floor_no=self._new_floor(),
                is_caught_up=self._is_caught_up,
            )
        )

    def _new_floor(self) -> int | None:
        """Return the new start of the history if enough can be pruned: half as much again as is kept."""
        history = self.definition.history
        if not history or history == ALL or self._event_no - self._floor_no <= history + history // 2:
            return None
        self._floor_no = self._event_no - history
        return self._floor_no

    async def _finish(self, *, is_over: bool) -> None:
        """Return when everything is durable; if the sources have ended, build the deferred indexes and mark the indexer
        caught up.
        """
        await self.flush()
        if is_over and not self._is_caught_up:
            if self.definition.defer_indexes:
                for table in self.staging.tables:
                    for column in table.entity.columns:
                        if column.is_indexed:
                            await self._ensure_index(table, column.name)
            self._is_caught_up = True
            self._pass_to_committer(self._event_no, [])
            await self.flush()

    # -- callbacks

    def _on_committed(self, committed: CommittedBatch) -> None:
        if self._failure is not None:
            return
        self.staging.committed(committed.batches_count)
        progress = self.progress
        progress.committed_no = committed.no
        progress.commits_count += 1
        progress.rows_count += committed.rows_count
        progress.runs_count += committed.runs_count
        progress.commit_s += committed.seconds
        if committed.runs_count:
            self.engine.wakeup.notify()
        self._commit_landed.set()

    async def _follow_rewind(self) -> None:
        """Follow the rewind of a source: the batch has ended, its commits are written, then the tables are rolled
        back.
        """
        rewind = self._source_reader.rewind
        assert rewind is not None
        name = self._source_reader.names[rewind.source]
        last = self._positions.get(name)
        if last is not None and (rewind.to is None or is_after(last, rewind.to)):
            await self.rollback(rewind.to, source=name)
            LOG.info("indexer.rolled_back", indexer=self.definition.name, source=name, to=rewind.to, no=self._event_no)
            await self._source_reader.start(self._positions, but=rewind.source)
        else:
            self._source_reader.sequencer.rewind(rewind.source, rewind.to)
        self._source_reader.rewind_followed()

    async def _ensure_index(self, table: StagedTable, name: str) -> None:
        """Build a deferred index when a query needs it, or when the end is reached."""
        key = (table.entity.table, name)
        if key not in self._built_indexes:
            committer = self._committer
            assert committer is not None
            await committer.run(lambda: self._retry(lambda: self._store.build_index(table.entity, name)))
            self._built_indexes.add(key)

    def _load_ahead(self) -> None:
        """Run the handlers of the next events ahead of a read that misses memory, so that they state what they need.

        Their number is adapted: it is multiplied by four if at least a sixteenth of them missed something, and reduced
        otherwise. One cold row in a warm batch therefore does not run the whole batch twice.
        """
        batch = self._batch
        if (
            not self._handling
            or batch is None
            or not self.definition.preload
            or self._event_offset < self._ahead_offset
        ):
            return
        if self._speculative is None:
            self._speculative = SpeculativeReads()
        names, handler_of = self._source_reader.names, self.definition.handlers.handler_of
        before, first = self._reads.pending_count, self._event_offset + 1
        self._ahead_offset = min(first + self._window, len(self._events))
        for at in range(first, self._ahead_offset):
            event = self._events[at]
            handler = handler_of(event)
            if handler is not None:
                name = names[0] if batch.sources is None else names[batch.sources[at]]
                time_us = None if batch.times is None else batch.times[at]
                no = self._event_no + at - self._event_offset
                context = HandlerContext(self._scope, no, name, batch.positions[at], time_us, event, is_preload=True)
                self._speculative.begin(handler, event, context)
        is_dense = (self._reads.pending_count - before) * DENSE_SHARE >= self._ahead_offset - first
        most = self._limits.index_batch_events_max
        self._window = min(self._window * 4, most) if is_dense else max(self._window // 4, WINDOW_MIN)

    def _watch_handlers(self) -> None:
        """End an indexer whose handler waits for ever. This is checked at intervals, without a timer per event."""
        stuck = self._stuck_handler() if self._watched_no == self._event_no else None
        if stuck is not None:
            self.fail(stuck)
            return
        self._watched_no = self._event_no
        self._watch_timer = self.engine.clock.call_later(self._limits.index_handler_timeout_s, self._watch_handlers)

    def _stuck_handler(self) -> HandlerFailed | None:
        """Return the error about the current handler if it has exceeded its time; None if no handler runs."""
        batch, at = self._batch, self._event_offset
        if not self._handling or batch is None:
            return None
        timeout_s, position = self._limits.index_handler_timeout_s, batch.positions[at]
        return HandlerFailed(
            f"the handler of the event at {position!r} has not ended in {timeout_s} s",
            hint="check what the handler waits for, or raise index_handler_timeout_s",
            indexer=self.definition.name,
            position=position,
        )
