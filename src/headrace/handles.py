"""Handles: a run or a batch that exists in the store, seen from the process that asked for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from headrace.core import batch as batches
from headrace.core import pack, run
from headrace.core.batch import Ledger
from headrace.core.failure import Failure, decode
from headrace.foundation.errors import ClientFault, HeadraceError
from headrace.foundation.ids import run_id
from headrace.runtime.engine import Engine
from headrace.store.protocol import Outcome as Recorded
from headrace.store.protocol import RunRecord

R = TypeVar("R")
RESULTS_PAGE: Final = 2_048
ResultOf = Callable[[bytes], Any]
PLAIN: Final[ResultOf] = msgspec.json.Decoder().decode


class RunFailed(HeadraceError):
    """The run whose result was asked for came to another end. `failure` says why; None when it was cancelled."""

    code = "RUN_FAILED"

    def __init__(self, message: str, *, failure: Failure | None, run: str) -> None:
        super().__init__(message, run=run)
        self.failure = failure


class WaitTimedOut(ClientFault):
    """What was waited for did not happen in time; it may still."""

    code = "TIMEOUT"


class Outcome(msgspec.Struct, Generic[R], frozen=True):
    """How one run of a batch ended. `ok` tells `output` from `failure`; cancelled and expired runs have neither."""

    index: int
    ok: bool
    state: str
    output: R | None
    failure: Failure | None


class Summary(NamedTuple):
    """A batch in numbers."""

    batch_id: str
    state: str
    ledger: Ledger

    @property
    def is_finished(self) -> bool:
        """No run of it will change any more."""
        return self.state != batches.OPEN and not self.ledger.waiting and not self.ledger.leased


class Run(Generic[R]):
    """One run. `id` is the same on every attempt."""

    def __init__(self, engine: Engine, batch_id: str, index: int, result_of: ResultOf = PLAIN) -> None:
        self._engine = engine
        self._result_of = result_of
        self.batch_id = batch_id
        self.index = index

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    @property
    def id(self) -> str:
        """The run's name outside."""
        return run_id(self.batch_id, self.index)

    async def view(self) -> RunRecord:
        """All that is known of it now."""
        return await self._engine.store.run(self.batch_id, self.index)

    async def result(self, *, timeout_s: float | None = None) -> R:
        """What the task returned, once it has. Raises `RunFailed` for another end, `WaitTimedOut`."""
        waiting = _Waiting(self._engine, timeout_s)
        while True:
            waiting.look()
            view = await self.view()
            if run.BY_NAME.get(view.state, run.WAITING) in run.FINAL:
                break
            await waiting.turn(f"run {self.id} has not ended ({view.state})")
        if view.state != run.NAMES[run.COMPLETED]:
            failure = decode(view.result) if view.result else None
            reason = f"{failure.type}: {failure.message}" if failure is not None else f"it was {view.state}"
            raise RunFailed(reason, failure=failure, run=self.id)
        value: R = await _value(self._engine, view.result, view.result_kind, self._result_of)
        return value

    async def cancel(self) -> bool:
        """Ask that it does not run, or stops; True when it had not ended."""
        engine = self._engine
        count = await engine.store.cancel_runs(self.batch_id, [self.index], now_us=engine.clock.now_us())
        engine.recorded.ring()
        return count > 0

    async def retry(self) -> bool:
        """Run it again from its first attempt; True when it had ended badly."""
        count = await self._engine.store.redrive(self.batch_id, [self.index])
        self._engine.doorbell.ring()
        return count > 0


class Batch(Generic[R]):
    """A batch of runs."""

    def __init__(self, engine: Engine, batch_id: str, result_of: ResultOf = PLAIN) -> None:
        self._engine = engine
        self._result_of = result_of
        self.id = batch_id

    def __repr__(self) -> str:
        return f"Batch({self.id!r})"

    async def summary(self) -> Summary:
        """Its state and its ledger now."""
        batch, ledger = await self._engine.store.batch(self.id)
        return Summary(self.id, batch.state, ledger)

    async def wait(self, *, timeout_s: float | None = None) -> Summary:
        """Until every run has ended. Raises `WaitTimedOut`."""
        waiting = _Waiting(self._engine, timeout_s)
        while True:
            waiting.look()
            batch, ledger = await self._engine.store.batch(self.id)
            if batch.is_finished:
                return Summary(self.id, batch.state, ledger)
            await waiting.turn(f"batch {self.id} has not ended ({batch.unsettled_count} runs to go)")

    async def results(self, *, from_index: int = 0, timeout_s: float | None = None) -> AsyncIterator[Outcome[R]]:
        """Outcomes in index order, each as soon as it and all before it are final; ends with the batch.

        `timeout_s` bounds the wait for each next outcome. Raises `WaitTimedOut`.
        """
        next_index = from_index
        waiting = _Waiting(self._engine, timeout_s)
        while True:
            waiting.look()
            batch, _ = await self._engine.store.batch(self.id)  # before the outcomes: a finished one has them all
            recorded = await self._engine.store.outcomes(self.id, next_index, RESULTS_PAGE)
            for one in recorded:
                yield await self._outcome(one)
            if recorded:
                next_index = recorded[-1].index + 1
                waiting = _Waiting(self._engine, timeout_s)
            elif batch.is_finished:
                return
            else:
                await waiting.turn(f"run {next_index} of batch {self.id} has not ended")

    async def cancel(self) -> Summary:
        """Start nothing more of it; what is under way is told."""
        engine = self._engine
        await engine.store.stop_batch(self.id, batches.CANCELLED, now_us=engine.clock.now_us())
        engine.recorded.ring()
        return await self.summary()

    async def redrive(self) -> int:
        """Run again what failed; answers how many runs."""
        count = await self._engine.store.redrive(self.id, None)
        self._engine.doorbell.ring()
        return count

    async def _outcome(self, one: Recorded) -> Outcome[R]:
        name = run.NAMES[one.state]
        if one.state == run.COMPLETED:
            value = await _value(self._engine, one.result, one.kind, self._result_of)
            return Outcome(one.index, True, name, value, None)
        return Outcome(one.index, False, name, None, decode(one.result) if one.result else None)


class _Waiting:
    """Waits for news of this process, or a poll interval for those of others, until a deadline."""

    def __init__(self, engine: Engine, timeout_s: float | None) -> None:
        self._engine = engine
        self._deadline_us = None if timeout_s is None else engine.clock.now_us() + int(timeout_s * 1_000_000)
        self._rings_count = 0

    def look(self) -> None:
        """Before the store is asked: what rings from here on is news."""
        self._rings_count = self._engine.recorded.rings_count

    async def turn(self, still: str) -> None:
        engine = self._engine
        wait_s = engine.limits.poll_interval_ms / 1_000
        if self._deadline_us is not None:
            left_s = (self._deadline_us - engine.clock.now_us()) / 1_000_000
            if left_s <= 0:
                raise WaitTimedOut(still, hint="is a worker running? `headrace queue list` shows what waits")
            wait_s = min(wait_s, left_s)
        await engine.recorded.wait(engine.clock, wait_s, since=self._rings_count)


async def _value(engine: Engine, result: bytes, kind: int, result_of: ResultOf) -> Any:
    if kind == pack.REFERENCE:
        result, kind = await engine.fetch(result)
    if kind == pack.TEXT:
        return result.decode()
    return result_of(result)
