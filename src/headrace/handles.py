"""Handles on runs and batches that exist in the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, Generic, Protocol, Self, TypeVar

import msgspec

from headrace.core import batch as batches
from headrace.core import pack, run
from headrace.core.batch import BatchRecord
from headrace.core.failure import Failure, decode
from headrace.core.serving import STALLED_AFTER_S, StalledLane, stalled_clause
from headrace.foundation.errors import ClientFault, HeadraceError, InvalidInput, StoreUnreachable
from headrace.foundation.ids import run_id
from headrace.foundation.logs import get_logger, run_ids
from headrace.runtime.engine import Engine
from headrace.runtime.owner_loop import OwnerLoop
from headrace.runtime.retrying import backoff_s
from headrace.runtime.tasks.run_slot import CURRENT_SLOT
from headrace.store.protocol import RunOutcome, RunRecord
from headrace.twins import blocking, blocking_iterator, on_owner_loop
from headrace.views import BatchView, Content, RunView, batch_view, content, full_batch_view, linked, run_view

LOG: Any = get_logger("headrace.handles")
R = TypeVar("R")
T = TypeVar("T")
RESULTS_PAGE: Final = 2_048
ResultOf = Callable[[bytes], Any]
PLAIN: Final[ResultOf] = msgspec.json.Decoder().decode


class RunFailed(HeadraceError):
    """The run ended without a result. `failure` says why it failed; None when it was cancelled or expired."""

    code = "RUN_FAILED"

    def __init__(self, message: str, *, failure: Failure | None, run: str) -> None:
        super().__init__(message, run=run)
        self.failure = failure


class WaitTimeout(ClientFault, TimeoutError):
    """`timeout_s` passed before a run or batch ended; it goes on, and can be waited for again."""

    code = "TIMEOUT"
    retryable = True


class Outcome(msgspec.Struct, Generic[R], frozen=True):
    """The outcome of one run of a batch.

    When `ok` is true, `output` is its result, else `failure` says why. Cancelled and expired runs have neither.
    """

    index: int
    ok: bool
    state: str
    output: R | None
    failure: Failure | None


class HandleOwner(Protocol):
    """The part of an app that its handles use."""

    @property
    def owner_loop(self) -> OwnerLoop:
        """The event loop of the app."""
        ...

    async def open(self) -> Engine:
        """Return the engine, opened when needed."""
        ...


class _Handle:
    """Base of the handles: the app, its engine when the handle was made, and the decoder of results."""

    def __init__(self, app: HandleOwner, engine: Engine, result_of: ResultOf) -> None:
        self._app = app
        self._made_with = engine
        self._result_of = result_of

    @property
    def _owner(self) -> OwnerLoop:
        return self._app.owner_loop

    async def _engine(self) -> Engine:
        """Return the app's engine; a handle made in testing mode stays with the store of its test."""
        return self._made_with if self._made_with.is_lent else await self._app.open()


class Run(_Handle, Generic[R]):
    """One run. `id` is the same on every attempt."""

    def __init__(
        self, app: HandleOwner, engine: Engine, batch_id: str, index: int, result_of: ResultOf = PLAIN
    ) -> None:
        super().__init__(app, engine, result_of)
        self.batch_id = batch_id
        self.index = index

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    @property
    def id(self) -> str:
        """The run's id, as the command line and the HTTP API show it."""
        return run_id(self.batch_id, self.index)

    @on_owner_loop
    async def view(self) -> RunView:
        """Return the run as it is now: state, times, input, output and attempts."""
        engine = await self._engine()
        return await run_view(engine, await engine.store.run(self.batch_id, self.index))

    @on_owner_loop
    async def result(self, *, timeout_s: float | None = None) -> R:
        """Wait for the run and return what its task returned.

        Raises `RunFailed` when the run failed, was cancelled or expired, and `WaitTimeout` after `timeout_s`.
        """
        engine = await self._engine()
        async with _OutcomeWait(engine, timeout_s, batch_id=self.batch_id, index=self.index) as waiting:
            while True:
                waiting.begin_check()
                record = await waiting.read(self._record)
                if run.BY_NAME.get(record.state, run.WAITING) in run.FINAL:
                    break
                lane = (record.queue, record.task) if record.state == run.NAMES[run.WAITING] else None
                await waiting.wait(f"run {self.id} has not ended ({record.state})", lane=lane)
        if record.state != run.NAMES[run.COMPLETED]:
            failure = decode(record.result) if record.result else None
            reason = f"{failure.type}: {failure.message}" if failure is not None else f"the run was {record.state}"
            raise RunFailed(reason, failure=failure, run=self.id)
        value: R = _value(await content(engine, record.result, record.result_kind), self._result_of)
        return value

    async def _record(self) -> RunRecord:
        engine = await self._engine()
        return await linked(engine, await engine.store.run(self.batch_id, self.index))

    @on_owner_loop
    async def cancel(self) -> bool:
        """Cancel the run, or ask its worker to stop it. Return False when it had ended already."""
        engine = await self._engine()
        return await engine.cancel_runs(self.batch_id, [self.index]) > 0

    @on_owner_loop
    async def redrive(self) -> bool:
        """Run it again from its first attempt. Return False unless it had failed, been cancelled or expired."""
        engine = await self._engine()
        count = await engine.store.redrive(self.batch_id, [self.index])
        engine.wakeup.notify()
        return count > 0

    view_sync = blocking(view)
    result_sync = blocking(result)
    cancel_sync = blocking(cancel)
    redrive_sync = blocking(redrive)


class Batch(_Handle, Generic[R]):
    """A batch of runs."""

    def __init__(self, app: HandleOwner, engine: Engine, batch_id: str, result_of: ResultOf = PLAIN) -> None:
        super().__init__(app, engine, result_of)
        self.id = batch_id

    def __repr__(self) -> str:
        return f"Batch({self.id!r})"

    @on_owner_loop
    async def view(self) -> BatchView:
        """Return the batch as it is now: its state and the counts of its runs."""
        engine = await self._engine()
        return await full_batch_view(engine, *await engine.store.batch(self.id))

    @on_owner_loop
    async def wait(self, *, timeout_s: float | None = None) -> BatchView:
        """Wait until every run has ended. Raises `WaitTimeout` after `timeout_s`."""
        engine = await self._engine()
        async with _OutcomeWait(engine, timeout_s, batch_id=self.id) as waiting:
            while True:
                waiting.begin_check()
                batch, ledger = await waiting.read(partial(engine.store.batch, self.id))
                if batch.is_finished:
                    return batch_view(batch, ledger)
                await waiting.wait(f"batch {self.id} has not ended ({batch.unsettled_count} runs left)")

    async def results(self, *, from_index: int = 0, timeout_s: float | None = None) -> AsyncIterator[Outcome[R]]:
        """Iterate over the outcomes in index order while the batch runs.

        An outcome comes as soon as its run and all runs before it have ended. `timeout_s` bounds the wait for each
        next outcome. Raises `WaitTimeout`.
        """
        next_index = from_index
        engine = await self._opened()
        waiting = _OutcomeWait(engine, timeout_s, batch_id=self.id)
        while True:
            batch, page = await self._next_page(waiting, next_index)
            first_index = next_index
            for stored in page:
                outcome = await self._outcome(stored)
                if outcome is None:
                    break
                yield outcome
                next_index = stored.index + 1
            if next_index > first_index:
                waiting = _OutcomeWait(engine, timeout_s, batch_id=self.id, has_read=True)
            elif batch.is_finished and not page:
                return
            else:  # the next outcome is that of a run elsewhere
                await self._next_page(waiting, next_index, is_linked=True)

    @on_owner_loop
    async def _opened(self) -> Engine:
        return await self._engine()

    @on_owner_loop
    async def _next_page(
        self, waiting: _OutcomeWait, next_index: int, *, is_linked: bool = False
    ) -> tuple[BatchRecord, list[RunOutcome]]:
        """Wait for the next outcomes, or for the end of the batch. `is_linked`: the next outcome is that of a run
        elsewhere, so wait first for a notification.
        """
        store = (await self._engine()).store

        async def read() -> tuple[BatchRecord, list[RunOutcome]]:
            batch, _ = await store.batch(self.id)  # before the outcomes: a finished batch has them all
            return batch, await store.outcomes(self.id, next_index, RESULTS_PAGE)

        async with waiting:
            while True:
                waiting.begin_check()
                batch, page = await waiting.read(read)
                if not is_linked and (page or batch.is_finished):
                    return batch, page
                await waiting.wait(f"run {next_index} of batch {self.id} has not ended")
                is_linked = False

    @on_owner_loop
    async def cancel(self) -> BatchView:
        """Cancel every waiting run, and ask workers to stop the running ones."""
        engine = await self._engine()
        await engine.stop_batch(self.id, batches.CANCELLED)
        return await self.view()

    @on_owner_loop
    async def redrive(self) -> int:
        """Run the failed runs again from their first attempt. Return how many there are."""
        engine = await self._engine()
        count = await engine.store.redrive(self.id, None)
        engine.wakeup.notify()
        return count

    async def _outcome(self, stored: RunOutcome) -> Outcome[R] | None:
        """Return one outcome; None while it links to a run that has not ended."""
        state, data, kind = stored.state, stored.result, stored.kind
        if kind in (pack.LINK, pack.REFERENCE) and state == run.COMPLETED:
            state, data, kind = await self._resolved(stored)
            if state not in run.FINAL:
                return None
        if state != run.COMPLETED:
            return Outcome(stored.index, False, run.NAMES[state], None, decode(data) if data else None)
        return Outcome(stored.index, True, run.NAMES[state], _value(Content(data, kind), self._result_of), None)

    @on_owner_loop
    async def _resolved(self, stored: RunOutcome) -> tuple[int, bytes, int]:
        """Return the state, result and kind of an outcome that links to another run or is stored as an object."""
        engine = await self._engine()
        state, data, kind = stored.state, stored.result, stored.kind
        if kind == pack.LINK:
            record = await linked(engine, await engine.store.run(self.id, stored.index))
            state, data, kind = run.BY_NAME.get(record.state, run.WAITING), record.result, record.result_kind
        if state == run.COMPLETED:
            data, kind = await content(engine, data, kind)
        return state, data, kind

    view_sync = blocking(view)
    wait_sync = blocking(wait)
    results_sync = blocking_iterator(results)
    cancel_sync = blocking(cancel)
    redrive_sync = blocking(redrive)


class _OutcomeWait:
    """Waits for a notification of outcomes, at most a poll interval at a time, until a deadline.

    Outcomes of this process notify at once; those of other processes are seen after a poll interval at the latest. A
    run that waits gives its slot back, and takes one again at the end of the block.
    """

    def __init__(
        self,
        engine: Engine,
        timeout_s: float | None,
        *,
        batch_id: str,
        index: int | None = None,
        has_read: bool = False,
    ) -> None:
        """`batch_id`, `index`: the batch or the run that is waited for. `has_read`: the store has answered this caller
        before.
        """
        self._engine = engine
        self._batch_id = batch_id
        self._index = index
        self._has_read = has_read
        self._watch = engine.recorded.watch(batch_id, index)
        self._slot = CURRENT_SLOT.get()
        self._slot_run_no: int | None = None
        self._deadline_us = None if timeout_s is None else engine.clock.now_us() + int(timeout_s * 1_000_000)
        self._check_at_us = engine.clock.now_us() + STALLED_AFTER_S * 1_000_000
        self._reported: set[StalledLane] = set()

    async def __aenter__(self) -> Self:
        """Begin to watch."""
        self._watch.begin(self._engine.clock)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Stop watching, and take a slot again if one was given back."""
        self._watch.end()
        run_no, self._slot_run_no = self._slot_run_no, None
        if self._slot is None or run_no is None:
            return
        if kind is None or issubclass(kind, Exception):
            await self._slot.take_again(run_no)
        else:
            self._slot.take_at_once(run_no)

    def begin_check(self) -> None:
        """Note the notifications so far, before the store is read: a later one ends the next `wait` at once."""
        self._watch.clear()

    async def read(self, call: Callable[[], Awaitable[T]]) -> T:
        """Read the store. An outage that begins after the first read is waited for, until the deadline."""
        engine, failures_count = self._engine, 0
        while True:
            try:
                value = await call()
            except StoreUnreachable:
                if not self._has_read:
                    raise
                failures_count += 1
                wait_s = backoff_s(failures_count)
                if self._deadline_us is not None:
                    left_s = (self._deadline_us - engine.clock.now_us()) / 1_000_000
                    if left_s <= wait_s or not await engine.outage.until_over(engine.clock, left_s):
                        raise
                await engine.clock.sleep(wait_s)
                await engine.outage.until_over(engine.clock)
            else:
                self._has_read = True
                return value

    async def wait(self, unmet: str, *, lane: tuple[str, str] | None = None) -> None:
        """Wait for the next notification. Raises `WaitTimeout` with the text `unmet` at the deadline.

        Its hint names runs that no live worker takes.
        After `STALLED_AFTER_S`, log the queues and tasks of the batch, or the one of a run, that no live worker takes.
        Raises `InvalidInput` in a run that waits for itself or for its own batch.
        """
        engine = self._engine
        if self._slot is not None and self._slot_run_no is None:
            self._refuse_own()
            self._slot_run_no = self._slot.give_back()
        check_s = (self._check_at_us - engine.clock.now_us()) / 1_000_000
        if check_s <= 0:
            check_s = STALLED_AFTER_S
            self._check_at_us = engine.clock.now_us() + STALLED_AFTER_S * 1_000_000
            if self._index is None or lane is not None:
                with suppress(StoreUnreachable):
                    await self._report_stalled(lane)
        wait_s = min(engine.limits.poll_interval_ms / 1_000, check_s)
        if self._deadline_us is not None:
            left_s = (self._deadline_us - engine.clock.now_us()) / 1_000_000
            if left_s <= 0:
                raise WaitTimeout(unmet, hint=await self._hint(lane))
            wait_s = min(wait_s, left_s)
        await self._watch.wait(engine.clock, wait_s)

    def _refuse_own(self) -> None:
        """Raise `InvalidInput` if the current run waits for its own end."""
        current = run_ids()
        if self._index is not None:
            if current.get("run") == run_id(self._batch_id, self._index):
                raise InvalidInput(
                    f"run {current['run']} waits for itself, which never ends",
                    hint="wait for the runs that this run enqueued",
                )
        elif current.get("batch") == self._batch_id:
            raise InvalidInput(
                f"a run of batch {self._batch_id} waits for this batch, which never ends",
                hint="wait in a run of another batch, or in the program that made the batch",
            )

    @property
    def _waited_batch_id(self) -> str:
        """The batch, if it is the batch that is waited for; empty for a run, whose batch may be a stream."""
        return self._batch_id if self._index is None else ""

    async def _report_stalled(self, lane: tuple[str, str] | None) -> None:
        for stalled in await self._stalled(lane):
            if stalled not in self._reported:
                self._reported.add(stalled)
                log_stalled(stalled, waited_s=STALLED_AFTER_S, batch=self._waited_batch_id)

    async def _hint(self, lane: tuple[str, str] | None) -> str:
        if self._index is None or lane is not None:
            for stalled in await self._stalled(lane):
                return f"{stalled_clause(stalled.queue, stalled.task, stalled.reason)}; {stalled.hint}"
        return "wait longer, or see `headrace run list` for what runs"

    async def _stalled(self, lane: tuple[str, str] | None) -> list[StalledLane]:
        """Return the lanes of a batch, or the one of a run, that no live worker takes."""
        engine = self._engine
        lanes = await engine.store.stalled_lanes(
            engine.environment, batch_id=self._waited_batch_id, now_us=engine.clock.now_us()
        )
        return [stalled for stalled in lanes if lane in (None, (stalled.queue, stalled.task))]


def log_stalled(lane: StalledLane, **fields: object) -> None:
    """Log that a caller waits for runs that no live worker takes."""
    given = {name: value for name, value in fields.items() if value}
    LOG.warning("wait.stalled", queue=lane.queue, task=lane.task, reason=lane.reason, hint=lane.hint, **given)


def _value(stored: Content, result_of: ResultOf) -> Any:
    return stored.data.decode() if stored.kind == pack.TEXT else result_of(stored.data)
