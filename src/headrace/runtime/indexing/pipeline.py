"""A running indexer: fetch, compute and commit as three loops that wait for each other only at bounded queues.

Handlers run strictly in order, one at a time, over staged rows. What a batch of them wrote is handed to the committer,
and the next begins. It waits when `index_depth_max` batches wait for their commit, and when memory is full of what is
not committed yet. Whatever ends one loop ends all: the error of a commit is raised to whoever waits, at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final, Literal

import structlog

from headrace.core.entity import Entity, EntityType
from headrace.core.sequencer import Position, Sequenced, is_after
from headrace.core.sizes import Sizes
from headrace.core.staging import StagedTable, Staging
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.foundation.limits import MIB, Limits
from headrace.runtime.clock import Timer
from headrace.runtime.engine import Engine
from headrace.runtime.indexing.committer import CommittedBatch, Committer, StagedBatch
from headrace.runtime.indexing.effects import Answered, Effect, Effects
from headrace.runtime.indexing.handler_context import HandlerContext, HandlerScope
from headrace.runtime.indexing.handler_registry import HandlerFailed, HandlerRegistry
from headrace.runtime.indexing.indexer_lease import lease
from headrace.runtime.indexing.read_coalescer import ReadCoalescer
from headrace.runtime.indexing.source_reader import SourceReader
from headrace.runtime.indexing.sources.source import Source
from headrace.runtime.indexing.speculative_reads import SpeculativeReads
from headrace.runtime.retrying import retry_transient
from headrace.runtime.tasks.exception_info import error_line
from headrace.store.entities.protocol import EFFECT_SUFFIX, EntityPlan, EntityStore, IndexerState

LOG: Any = structlog.get_logger("headrace.indexer")
TURN_S: Final = 0.002
"""Rule R18: how long handlers keep the loop before others have a turn."""
LOOK_EVENTS: Final = 64
"""Events between two looks at the time and at memory."""
WINDOW: Final = 1_024
WINDOW_LEAST: Final = 64
DENSE: Final = 16
"""Events that run ahead of a read that memory can't answer: at first, at least, and how many may ask for one row."""
ALL: Final = 2**62
"""Every checkpoint is kept."""

Where = Literal["overlay", "drain"]


@dataclass(slots=True, kw_only=True)
class IndexerDefinition:
    """What an indexer is, before it runs."""

    name: str
    sources: Mapping[str, Source]
    entities: Sequence[type[Entity]]
    handlers: HandlerRegistry
    effects: list[Effect] = field(default_factory=list)
    history: int = 0
    where: Where = "overlay"
    defer_indexes: bool = False
    preload: bool = True

    def plan(self, environment: str, limits: Limits) -> EntityPlan:
        """What it keeps. Raises `InvalidSetting` for entities that can't be tables."""
        types = [EntityType(cls, row_bytes_max=limits.index_row_bytes_max) for cls in self.entities]
        if any(effect.cache for effect in self.effects):
            name = self.name.replace("-", "_") + EFFECT_SUFFIX
            types.append(EntityType(Answered, row_bytes_max=2 * MIB, name=name))
        if not types:
            raise InvalidSetting(f"the indexer {self.name!r} has no entities", hint="entities=[…]")
        return EntityPlan(environment, self.name, tuple(types), bool(self.history), self.defer_indexes)


@dataclass(slots=True)
class IndexerProgress:
    """How far an indexer has come and where its time went, in seconds since it started."""

    no: int = 0
    committed_no: int = 0
    events_count: int = 0
    rows_count: int = 0
    runs_count: int = 0
    commits_count: int = 0
    fetch_wait_s: float = 0.0
    commit_wait_s: float = 0.0
    compute_s: float = 0.0
    query_s: float = 0.0
    commit_s: float = 0.0
    memory_bytes: int = 0
    positions: dict[str, Position] = field(default_factory=dict)
    heads: dict[str, Position] = field(default_factory=dict)


class IndexerPipeline:
    """One run of an indexer on one loop: `start`, `run`, `close`."""

    def __init__(self, definition: IndexerDefinition, engine: Engine, store: EntityStore) -> None:
        self.definition = definition
        self.engine = engine
        self.progress = IndexerProgress()
        self._store = store
        self._limits = engine.limits
        self.plan = definition.plan(engine.environment, engine.limits)
        keeps = [entity.table for entity in self.plan.entities if self.plan.keeps_history(entity)]
        self.staging = Staging(self.plan.entities, keeps_history=keeps)
        self._lookups = ReadCoalescer(self.staging, store, engine.clock, retries_max=self._limits.index_retries_max)
        self._lookups.before_query = self._load_ahead
        if definition.where == "drain":
            self._lookups.settle_first = self.flush
        if definition.defer_indexes:
            self._lookups.before_where = self._ensure_index
        effects = Effects(
            self.staging,
            self.staging.by_class.get(Answered),
            self._lookups,
            engine.clock,
            calls_max=self._limits.index_effects_max,
        )
        self._effects = effects
        self._shared = HandlerScope(definition.name, self.staging, self._lookups, effects, engine.clock, engine.limits)
        definition.handlers.ready()
        self._news = asyncio.Event()
        self._landed = asyncio.Event()
        self._fetching = SourceReader(
            definition.sources, waiting_max=self._limits.index_fetch_events_max, news=self._news.set
        )
        self._committer: Committer | None = None
        self._failure: BaseException | None = None
        self._running: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._watch: Timer | None = None
        self._watched_no = -1
        self._token = 0
        self._no = 0
        self._floor_no = 0
        self._is_caught_up = False
        self._positions: dict[str, Position] = {}
        self._batch: Sequenced | None = None
        self._events: list[Any] = []
        self._at = 0
        self._handling = False
        self._preload: SpeculativeReads | None = None
        self._ahead_at = 0
        self._window = WINDOW
        self._built: set[tuple[str, str]] = set()

    # -- life

    async def start(self, *, wait: bool = True, on_waiting: Callable[[str], None] | None = None) -> IndexerState:
        """Make the tables, take the lease, and begin where the last commit left off."""
        standing = await self._asking(lambda: self._store.prepare(self.plan))
        standing, token = await lease(self._store, self.engine, standing, wait=wait, on_waiting=on_waiting)
        self._stand(standing)
        self._committer = Committer(
            self.engine, self._store, self.plan, token,
            on_landed=self._on_landed, on_failed=self.fail,
            busy=lambda: self._no if self._handling else None, stuck=self._stuck,
        )  # fmt: skip
        self._token = token
        self._committer.start()
        return standing

    async def run(self, *, until: Position | None = None) -> IndexerProgress:
        """Index until the sources end, `until` was reached, or `stop`. Raises what ended it otherwise.

        A run that ended may be followed by another, which reads the sources on.
        """
        if self._failure is not None:
            raise self._failure
        if self._running is not None:
            raise InvalidInput(
                f"the indexer {self.definition.name!r} is running already", hint="await the run there is"
            )
        if until is not None and len(self._fetching.names) != 1:
            raise InvalidInput("until is a position of one source, and this indexer has several")
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
            await self._fetching.close()
        if self._failure is not None:
            raise self._failure
        return self._told()

    def stop(self) -> None:
        """Begin no further batch; `run` returns when all that was staged is committed."""
        self._is_stopping = True
        self._news.set()
        self._landed.set()

    def fail(self, error: BaseException) -> None:
        """End everything with this error; the first one counts."""
        if self._failure is not None:
            return
        self._failure = error
        self._lookups.fail(error)
        self._news.set()
        self._landed.set()
        if self._running is not None and self._running is not asyncio.current_task():
            self._running.cancel()

    async def close(self) -> None:
        """Commit what is staged (after a failure nothing) and give the lease back; a second close does nothing."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        await self._fetching.close()
        await self._effects.close()
        committer, self._committer = self._committer, None
        if committer is not None:
            await committer.close(now=self._failure is not None)
        await self._lookups.close()

    async def flush(self) -> None:
        """Return when everything that was handed to the committer is durable. Raises what ended it."""
        while self.staging.pending_count and self._failure is None:
            self._landed.clear()
            await self._landed.wait()
        if self._failure is not None:
            raise self._failure

    async def rollback(self, to: Position | None, *, source: str | None = None) -> IndexerState:
        """Drain, and go back to after the last event at or before a position; None is before the first."""
        name = self._fetching.names[0] if source is None else source
        if name not in self._fetching.names or (source is None and len(self._fetching.names) > 1):
            known = ", ".join(self._fetching.names)
            raise InvalidInput("say which source goes back", hint=f"one of: {known}")
        await self.flush()
        committer = self._committer
        assert committer is not None
        standing: IndexerState = await committer.run(
            lambda: self._asking(
                lambda: self._store.rollback(self.plan, self._token, old_no=self._no, source=name, to=to)
            )
        )
        self.staging.clear()
        self._stand(standing)
        return standing

    def told(self) -> IndexerProgress:
        """How far it has come."""
        return self._told()

    async def look_ahead(self) -> None:
        """Ask the sources where they end, for whoever shows progress."""
        self.progress.heads = await self._fetching.heads()

    def _told(self) -> IndexerProgress:
        told = self.progress
        told.no, told.positions = self._no, dict(self._positions)
        told.query_s = self._lookups.query_s
        told.memory_bytes = self.staging.bytes
        return told

    async def _asking(self, call: Callable[[], Any]) -> Any:
        return await retry_transient(
            call, self.engine.clock, what=f"indexer {self.definition.name}", waits_max=self._limits.index_retries_max
        )

    def _stand(self, standing: IndexerState) -> None:
        unknown = set(standing.positions) - set(self._fetching.names)
        if unknown:
            raise InvalidSetting(
                f"the indexer {standing.name!r} has read the source {min(unknown)!r}, which it has no more",
                hint="call the source what it was called, or `headrace index reset`",
            )
        self._no, self._positions = standing.no, dict(standing.positions)
        self._floor_no, self._is_caught_up = standing.floor_no, standing.is_caught_up
        self.progress.committed_no = standing.no

    # -- compute

    async def _main(self, until: Position | None) -> None:
        self._batch, self._events = None, []
        self._sizes = Sizes(self._limits.index_batch_events_max, is_even=not self._limits.index_depth_max)
        await self._fetching.start(self._positions)
        if self._watch is not None:
            self._watch.cancel()
        self._watch_handlers()
        while not self._is_stopping:
            self._check()
            if self._is_between and self._fetching.turn is not None:
                await self._follow_turn()
                continue
            if self._is_between and not self._take(until):
                if self._fetching.sequencer.is_over or self._is_reached(until):
                    break
                await self._wait(self._news, "fetch_wait_s")
                continue
            await self._make_room()
            if not self._is_told_to_stop:
                await self._compute()
        is_cut = until is not None and self._past_until(until)
        await self._finish(is_over=self._fetching.sequencer.is_over and not self._is_told_to_stop and not is_cut)

    @property
    def _is_told_to_stop(self) -> bool:
        return self._is_stopping

    @property
    def _is_between(self) -> bool:
        """No batch is under way."""
        return self._batch is None

    def _check(self) -> None:
        failure = self._failure or self._fetching.failure
        if failure is not None:
            raise failure

    def _take(self, until: Position | None) -> bool:
        self._news.clear()
        sequencer = self._fetching.sequencer
        taken = sequencer.take(self._sizes.size(sequencer.left))
        if taken is None:
            return False
        self._sizes.grow()
        self._fetching.took()
        if until is not None:
            count = sum(1 for own in taken.positions if not is_after(own, until))
            if not count:
                return False
            taken = Sequenced(taken.positions[:count], taken.events[:count], taken.times, taken.sources)
        names = self._fetching.names
        self._events = self.definition.handlers.decoded(
            taken.events, taken.positions, names[0] if taken.sources is None else [names[own] for own in taken.sources]
        )
        self._batch, self._at, self._ahead_at = taken, 0, 0
        return True

    def _is_reached(self, until: Position | None) -> bool:
        if until is None:
            return False
        last = self._positions.get(self._fetching.names[0])
        return self._past_until(until) or (last is not None and not is_after(until, last))

    def _past_until(self, until: Position) -> bool:
        """Whether what was taken last lay behind: then nothing before it can come any more."""
        last = self._fetching.sequencer.last_taken
        return last is not None and is_after(last, until)

    async def _make_room(self) -> None:
        """Wait while too many batches wait for their commit, or memory holds too much that may not leave yet."""
        depth = max(self._limits.index_depth_max, 1)
        bytes_max = self._limits.index_memory_mib * MIB
        while self.staging.pending_count >= depth and not self._is_told_to_stop:
            await self._wait(self._landed, "commit_wait_s")
        if (
            self.staging.bytes > bytes_max
        ):  # rows that were loaded ahead may leave: they are asked for again, fewer at once
            self._ahead_at = 0
            self._window = max(self._window // 4, WINDOW_LEAST)
        while self.staging.bytes > bytes_max and not self.staging.evict(bytes_max * 9 // 10):
            if not self.staging.pending_count or self._is_told_to_stop:
                return  # one batch alone is more: nothing that could be waited for would help
            await self._wait(self._landed, "commit_wait_s")

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
        """Handlers in order, until the batch is over or memory is full; then cut."""
        assert self._batch is not None
        old_no, first_at = self._no, self._at
        started, waited_s = perf_counter(), self.progress.commit_wait_s
        try:
            await self._handle(self._batch)
        finally:
            if self._preload is not None:
                preload, self._preload = self._preload, None
                await preload.end()
        self._effects.forget()
        self._shared.ahead.clear()
        self.progress.events_count += self._at - first_at
        self.progress.compute_s += perf_counter() - started - (self.progress.commit_wait_s - waited_s)
        self._cut(old_no, first_at)
        if not self._limits.index_depth_max:
            await self._settled()

    async def _settled(self) -> None:
        started = perf_counter()
        await self.flush()
        self.progress.commit_wait_s += perf_counter() - started

    async def _handle(self, batch: Sequenced) -> None:
        shared, names, handlers = self._shared, self._fetching.names, self.definition.handlers
        positions, times, sources, events = batch.positions, batch.times, batch.sources, self._events
        handler_of, by_type, name = handlers.handler_of, handlers.by_type, names[0]
        bytes_max = self._limits.index_memory_mib * MIB
        turn_until = perf_counter() + TURN_S
        self._handling = True
        try:
            for at in range(self._at, len(events)):
                self._no += 1
                self._at = at
                event = events[at]
                handler = by_type.get(type(event)) or handler_of(event)
                if handler is not None:
                    if sources is not None:
                        name = names[sources[at]]
                    time_us = None if times is None else times[at]
                    context = HandlerContext(shared, self._no, name, positions[at], time_us, event)
                    try:
                        await handler(event, context)
                    except Exception as error:
                        if self._failure is not None:
                            raise self._failure from None
                        raise self._failed(error, name, positions[at]) from error
                    finally:
                        context.is_over = True
                if not at % LOOK_EVENTS:
                    self._check()
                    if perf_counter() > turn_until:
                        await asyncio.sleep(0)
                        turn_until = perf_counter() + TURN_S
                    if shared.fault is not None:
                        raise shared.fault
                    if self.staging.bytes > bytes_max:
                        break
        finally:
            self._handling = False
        self._at += 1
        if shared.fault is not None:
            raise shared.fault

    def _failed(self, error: Exception, source: str, position: Position) -> HandlerFailed:
        return HandlerFailed(
            f"the handler of the event at {position!r} failed: {error_line(error)}",
            hint="nothing after the last commit was written; mend it and start again",
            indexer=self.definition.name,
            source=source,
            position=position,
        )

    def _cut(self, old_no: int, first_at: int) -> None:
        """Hand what the handlers wrote to the committer."""
        batch = self._batch
        assert batch is not None
        names = self._fetching.names
        at = range(first_at, self._at)
        if batch.sources is None:
            own = [names[0]] * len(at)
            self._positions = {names[0]: batch.positions[self._at - 1]}
        else:
            own = [names[batch.sources[one]] for one in at]
            self._positions = self._positions | {name: batch.positions[one] for name, one in zip(own, at, strict=True)}
        checkpoints = []
        if self.plan.history:
            numbers = range(old_no + 1, self._no + 1)
            checkpoints = [(no, name, batch.positions[one]) for no, name, one in zip(numbers, own, at, strict=True)]
        if self._at == len(batch.positions):
            self._batch, self._events = None, []
        self._put(old_no, checkpoints)

    def _put(self, old_no: int, checkpoints: list[tuple[int, str, Position]]) -> None:
        asked, self._shared.asked = self._shared.asked, []
        assert self._committer is not None
        self._committer.put(
            StagedBatch(
                staged=self.staging.cut(),
                old_no=old_no,
                no=self._no,
                positions=self._positions,
                checkpoints=checkpoints,
                asked=asked,
                floor_no=self._raised_floor(),
                is_caught_up=self._is_caught_up,
            )
        )

    def _raised_floor(self) -> int | None:
        """History is pruned in pieces: when half as much again as is wanted has gathered."""
        history = self.definition.history
        if not history or history == ALL or self._no - self._floor_no <= history + history // 2:
            return None
        self._floor_no = self._no - history
        return self._floor_no

    async def _finish(self, *, is_over: bool) -> None:
        """Everything is durable when this returns; a source that ended is caught up with, and its indexes are there."""
        await self.flush()
        if is_over and not self._is_caught_up:
            if self.definition.defer_indexes:
                for table in self.staging.tables:
                    for column in table.entity.columns:
                        if column.is_indexed:
                            await self._ensure_index(table, column.name)
            self._is_caught_up = True
            self._put(self._no, [])
            await self.flush()

    # -- what others tell

    def _on_landed(self, landed: CommittedBatch) -> None:
        if self._failure is not None:
            return
        self.staging.committed(landed.batches_count)
        told = self.progress
        told.committed_no = landed.no
        told.commits_count += 1
        told.rows_count += landed.rows_count
        told.runs_count += landed.runs_count
        told.commit_s += landed.seconds
        if landed.runs_count:
            self.engine.wakeup.notify()
        self._landed.set()

    async def _follow_turn(self) -> None:
        """A source goes back: the batch has ended, its commits land, and the tables follow."""
        turn = self._fetching.turn
        assert turn is not None
        name = self._fetching.names[turn.source]
        last = self._positions.get(name)
        if last is not None and (turn.to is None or is_after(last, turn.to)):
            await self.rollback(turn.to, source=name)
            LOG.info("went back", indexer=self.definition.name, source=name, to=turn.to, no=self._no)
            await self._fetching.start(self._positions, but=turn.source)
        else:
            self._fetching.sequencer.rewind(turn.source, turn.to)
        self._fetching.turned()

    async def _ensure_index(self, table: StagedTable, name: str) -> None:
        """A deferred index is built when somebody asks for it, or when the end is reached."""
        key = (table.entity.table, name)
        if key not in self._built:
            committer = self._committer
            assert committer is not None
            await committer.run(lambda: self._asking(lambda: self._store.build_index(table.entity, name)))
            self._built.add(key)

    def _load_ahead(self) -> None:
        """A read that memory can't answer: let the handlers of the next events say what they need.

        Of how many, is learned: four times as many where a sixteenth of those that ran ahead missed something, else
        fewer, so that one cold row in a warm batch does not run the whole batch twice.
        """
        batch = self._batch
        if not self._handling or batch is None or not self.definition.preload or self._at < self._ahead_at:
            return
        if self._preload is None:
            self._preload = SpeculativeReads()
        names, handler_of = self._fetching.names, self.definition.handlers.handler_of
        before, first = self._lookups.asked_count, self._at + 1
        self._ahead_at = min(first + self._window, len(self._events))
        for at in range(first, self._ahead_at):
            event = self._events[at]
            handler = handler_of(event)
            if handler is not None:
                name = names[0] if batch.sources is None else names[batch.sources[at]]
                time_us = None if batch.times is None else batch.times[at]
                no = self._no + at - self._at
                context = HandlerContext(self._shared, no, name, batch.positions[at], time_us, event, is_preload=True)
                self._preload.begin(handler, event, context)
        is_dense = (self._lookups.asked_count - before) * DENSE >= self._ahead_at - first
        most = self._limits.index_batch_events_max
        self._window = min(self._window * 4, most) if is_dense else max(self._window // 4, WINDOW_LEAST)

    def _watch_handlers(self) -> None:
        """End an indexer whose handler waits for ever: it is looked at, not timed, so that no event pays for it."""
        stuck = self._stuck() if self._watched_no == self._no else None
        if stuck is not None:
            self.fail(stuck)
            return
        self._watched_no = self._no
        self._watch = self.engine.clock.call_later(self._limits.index_handler_timeout_s, self._watch_handlers)

    def _stuck(self) -> HandlerFailed | None:
        """What is to be said of the handler that runs now, when it has not ended in its time; None where none does."""
        batch, at = self._batch, self._at
        if not self._handling or batch is None:
            return None
        timeout_s, position = self._limits.index_handler_timeout_s, batch.positions[at]
        return HandlerFailed(
            f"the handler of the event at {position!r} has not ended in {timeout_s} s",
            hint="what does it wait for? index_handler_timeout_s is its bound",
            indexer=self.definition.name,
            position=position,
        )
