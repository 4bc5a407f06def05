"""Executes the runs of leases in this process.

Rules R15 (runners are long-lived), R16 (each run has its own context), R17 (timeouts are armed at the first suspension)
and R18 (the loop is yielded every 2 ms): a run that never waits costs no task, no future, no timer and no log line.

Suspects (runs of a span that was leased during two crashes or more) execute one at a time, so that the next crash
identifies the run that caused it.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context as Variables
from contextvars import copy_context
from functools import partial
from time import monotonic, perf_counter
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import structlog

from headrace.core import pack, run
from headrace.core.failure import Failure
from headrace.core.retry import retry_at_us
from headrace.core.span import RETRY
from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import Limits
from headrace.runtime.clock import Clock
from headrace.runtime.retrying import retry_transient
from headrace.runtime.sessions.active_lease import BEGUN, ENDED, ActiveLease, DirectCall, RetractedRuns, retract
from headrace.runtime.tasks.context import Context
from headrace.runtime.tasks.exception_info import describe, error_line
from headrace.runtime.tasks.payload_codec import Arguments
from headrace.runtime.tasks.superjson import PayloadRefused
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.direct_call import GENERAL_CALL, choose_call
from headrace.runtime.worker.run_driver import CANCELLED, STOPPED, TIMEOUT, RunnerState, driven, outcome_of, shielded

LOG: Any = structlog.get_logger("headrace.executor")
SLICE_S: Final = 0.002
LOOKS_MAX: Final = 16
"""Runs between two looks at the clock once a burst has shown that its runs are short."""
INSIST_S: Final = 5.0
STOP_S: Final = 1.0
SUSPECT_CRASHES: Final = 2


class PayloadAccess(Protocol):
    """Where payloads and results over the inline limit live."""

    async def fetch(self, reference: bytes) -> tuple[bytes, int]:
        """What a reference refers to, and its kind."""

    async def put_result(self, batch_id: str, result: bytes) -> tuple[bytes, str]:
        """Store a result; answers the reference and the object's key."""


class ExecutorCallbacks(NamedTuple):
    """What the executor tells its owner: work that is over, and work whose first unsent outcome just came."""

    over: Callable[[ActiveLease], None]
    dirty: Callable[[ActiveLease], None]


BURST_RUNS: Final = 4_096


class Executor:
    """Takes leased work in, runs at most `concurrency` runs at a time, records how each ended.

    `inline_sync`: plain functions run on the loop's own thread (a child process that does nothing else).
    """

    def __init__(
        self,
        registry: Registry,
        *,
        concurrency: int,
        clock: Clock,
        offload: PayloadAccess,
        limits: Limits,
        hooks: ExecutorCallbacks,
        inline_sync: bool = False,
        deadline: Callable[[int], None] | None = None,
    ) -> None:
        """`deadline` is told when the inline run under way must end, by the monotonic clock in microseconds."""
        self.registry = registry
        self.concurrency = concurrency
        self.unbegun_count = 0
        self.in_flight_count = 0
        self.ended_count = 0
        self._clock = clock
        self._offload = offload
        self._inline_bytes_max = limits.inline_bytes_max
        self._error_chars_max = limits.error_chars_max
        self._hooks = hooks
        self._inline_sync = inline_sync
        self._deadline = deadline
        self._ready: deque[ActiveLease] = deque()
        self._suspects: deque[ActiveLease] = deque()
        self._alone: ActiveLease | None = None
        self._runners: list[RunnerState] = []
        self._idle: list[asyncio.Future[None]] = []
        self._is_stopping = False
        self._canary: asyncio.Task[bool] | None = None
        self._quiet = asyncio.Event()
        self._variables = copy_context()
        self._threads: ThreadPoolExecutor | None = None
        self._encode = msgspec.json.Encoder().encode
        self._random = random.Random().random  # noqa: S311 - jitter, not secrets

    # -- work in and out

    def submit(self, work: ActiveLease) -> None:
        """Queue a lease's runs; they begin as runners get to them."""
        if self._canary is None:
            self._canary = asyncio.create_task(asyncio.Event().wait(), name="headrace-canary")
        self.unbegun_count += work.unbegun_count
        if work.lease.crashes_count >= SUSPECT_CRASHES:
            self._suspects.append(work)
        else:
            self._ready.append(work)
        self._wake_one()

    def take_unbegun(self) -> list[ActiveLease]:
        """All work with runs that have not begun, which will not begin any more."""
        left = [
            work for work in (*self._ready, *self._suspects, self._alone) if work is not None and work.unbegun_count
        ]
        self._ready.clear()
        self._suspects.clear()
        self._alone = None
        self.unbegun_count = 0
        return left

    def retract(self, runs_count: int) -> RetractedRuns:
        """Let go of runs that nobody has begun, at most `runs_count`, the last first."""
        retracted = retract(self._ready, runs_count)
        self.unbegun_count -= retracted.runs_count
        return retracted

    def interrupt(self, wanted: Callable[[ActiveLease, int], bool], reason: str) -> None:
        """Interrupt the runs under way that `wanted(work, number)` names; cancelled ones that wait won't begin."""
        for runner in self._runners:
            if runner.work is not None and wanted(runner.work, runner.number):
                self._interrupt(runner, reason)
        if reason != CANCELLED:
            return
        for work in (*self._ready, *self._suspects, self._alone):
            if work is not None and (named := {n for n in range(work.cursor, work.count) if wanted(work, n)}):
                work.unwanted |= named
                work.plan = GENERAL_CALL

    def _interrupt(self, runner: RunnerState, reason: str) -> None:
        """Interrupt, and insist now and then: a run may swallow it and go on."""
        if runner.interrupt(reason):
            self._insist_later(runner)

    def _insist_later(self, runner: RunnerState) -> None:
        def again() -> None:
            runner.insist()
            self._insist_later(runner)

        if runner.timer is not None:
            runner.timer.cancel()
        runner.timer = self._clock.call_later(INSIST_S, again)

    async def stop(self, *, grace_s: float) -> None:
        """Begin nothing more; wait `grace_s` for what is under way, then interrupt it.

        Called again while the first call waits, it cuts that grace short. A run that doesn't hear is left behind.
        """
        self._is_stopping = True
        for future in self._idle:
            if not future.done():
                future.set_result(None)
        self._idle.clear()
        if self.in_flight_count:
            self._quiet.clear()
            if grace_s > 0:
                await self._clock.wait_for(self._quiet, grace_s)
            self.interrupt(lambda _work, _number: True, STOPPED)
        if tasks := [runner.task for runner in self._runners if runner.task is not None]:
            await asyncio.wait(tasks, timeout=STOP_S)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=STOP_S)
        if self._canary is not None:
            self._canary.cancel()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    # -- runners

    def _wake_one(self) -> None:
        while self._idle:
            future = self._idle.pop()
            if not future.done():
                future.set_result(None)
                return
        if len(self._runners) < self.concurrency and not self._is_stopping:
            runner = RunnerState()
            self._runners.append(runner)
            runner.task = asyncio.create_task(self._run(runner), name=f"headrace-runner-{len(self._runners)}")
            runner.task.add_done_callback(lambda _: self._gone(runner))

    def _gone(self, runner: RunnerState) -> None:
        """A runner ended without a stop (a `GeneratorExit` closes all who await it): another takes its place."""
        if not self._is_ending:
            self._runners.remove(runner)
            self._wake_one()

    def _next_work(self) -> ActiveLease | None:
        """The work whose next run may begin, or None."""
        if self._is_stopping:
            return None
        if self._suspects or self._alone is not None:
            return self._next_alone()
        while self._ready:
            work = self._ready[0]
            if work.cursor < work.count:
                return work
            self._ready.popleft()
        return None

    def _next_alone(self) -> ActiveLease | None:
        alone = self._alone
        if alone is not None and alone.cursor < alone.count:
            return alone
        if self.in_flight_count:
            return None
        self._alone = self._suspects.popleft() if self._suspects else None
        return self._alone if self._alone is not None else self._next_work()

    @property
    def _is_ending(self) -> bool:
        """Stopped, or the loop ends under us: then every task is cancelled at once, the canary too."""
        canary = self._canary
        return self._is_stopping or canary is None or canary.cancelling() > 0 or canary.done()

    async def _run(self, runner: RunnerState) -> None:
        """A runner survives whatever its runs do, but not the end of the executor."""
        while not self._is_stopping:
            try:
                await self._take_runs(runner)
            except asyncio.CancelledError:
                if self._is_ending:
                    raise
                runner.calm()
            except Exception:
                LOG.exception("a runner met an error that is not its run's")

    async def _take_runs(self, runner: RunnerState) -> None:
        began = perf_counter()
        while not self._is_stopping:
            work = self._next_work()
            if work is None:
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._idle.append(future)
                await future
                began = perf_counter()
                continue
            plan = work.plan or choose_call(work, self.registry, has_deadline=self._deadline is not None)
            if plan is not GENERAL_CALL:
                if (rest := self._burst(work, plan, runner)) is None:
                    await self._turn(runner)
                    continue
                number = work.cursor - 1
            else:
                number = work.begin()
                self.unbegun_count -= 1
                self.in_flight_count += 1
                rest = self._begin(work, number, runner)
            if rest is not None:
                runner.work, runner.number = work, number
                if self.unbegun_count:
                    self._wake_one()
                try:
                    await self._finish(runner, rest)
                finally:
                    runner.rest()
                    self._ended(work)
                began = perf_counter()
            else:
                self._ended(work)
            if runner.is_disturbed or perf_counter() - began > SLICE_S:
                await self._turn(runner)
                began = perf_counter()

    async def _turn(self, runner: RunnerState) -> None:
        """Give the loop a turn, and let a cancellation that a run left behind hit nobody."""
        try:
            runner.calm()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            if self._is_ending:
                raise
            runner.calm()

    async def _finish(self, runner: RunnerState, rest: Awaitable[None]) -> None:
        """Await the rest of a run; an interruption ends the run, not the runner."""
        work, number = runner.work, runner.number
        assert work is not None
        try:
            await rest
        except BaseException as error:
            if runner.reason:
                self._interrupted(work, number, runner.reason)
            elif isinstance(error, asyncio.CancelledError) and self._is_ending:
                self._interrupted(work, number, STOPPED)
                raise
            else:
                self._fail(work, number, self._spec(work, number), error)

    def _ended(self, work: ActiveLease) -> None:
        self.in_flight_count -= 1
        self.ended_count += 1
        if self._deadline is not None:
            self._deadline(0)
        self._report(work)
        if not self.in_flight_count:
            self._quiet.set()
            if self._suspects or self._alone is not None:
                self._wake_one()

    # -- many runs of the usual kind

    def _burst(self, work: ActiveLease, plan: DirectCall, runner: RunnerState) -> Awaitable[None] | None:
        """Run the next runs of `work` one after the other, for 2 ms at most, until one of them waits.

        None: the slice is over or the lease's runs have all begun. Else what is left to await of the last one
        begun. This is the hot path: nothing per run but what the run itself needs (rule R15).
        """
        function, decode = plan
        encode, inline_max = self._encode, self._inline_bytes_max
        span_slots, marks, payloads = work.span_slots, work.marks, work.lease.payloads
        copy_variables = self._variables.copy
        first = number = work.cursor
        stop = min(work.count, first + BURST_RUNS)
        rest: Awaitable[None] | None = None
        until, look_at, step = perf_counter() + SLICE_S, number + 1, 1
        while number < stop:
            span_slot = span_slots[number]
            marks[span_slot] = BEGUN
            try:
                argument = decode(payloads[number])
            except Exception:  # noqa: BLE001 - decoded again, the slow way, it says why
                rest = self._call(work, number, runner, payloads[number], pack.JSON)
                number += 1
                break
            try:
                variables = copy_variables()
                coro = function(argument)
                waits_for = variables.run(coro.send, None)
            except StopIteration as done:
                try:
                    result = encode(done.value)
                except Exception:  # noqa: BLE001 - encoded again, the slow way, it says why
                    result = b""
                if result and len(result) < inline_max:
                    work.codes[number] = run.COMPLETED
                    work.results[number] = result
                    marks[span_slot] = ENDED
                    number += 1
                    if number >= look_at:
                        if perf_counter() > until:
                            break
                        step = min(2 * step, LOOKS_MAX)
                        look_at = number + step
                    continue
                rest = self._complete(work, number, done.value)
            except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome
                self._fail(work, number, self._spec(work, number), error)
            else:
                spec = self.registry.get(work.lease.task)
                rest = self._waiting(work, number, runner, spec, driven(coro, variables, waits_for))
            number += 1
            break
        self._account(work, number - first, rest is not None)
        return rest

    def _account(self, work: ActiveLease, begun_count: int, is_last_waiting: bool) -> None:
        """Count a burst: all of it began, all of it but perhaps the last has ended."""
        work.cursor += begun_count
        self.unbegun_count -= begun_count
        ended_count = begun_count - is_last_waiting
        self.in_flight_count += is_last_waiting
        self.ended_count += ended_count
        work.ended_count = work.count - work.codes.count(0)
        if ended_count:
            self._report(work)

    def _report(self, work: ActiveLease) -> None:
        if work.ended_count == work.count:
            self._hooks.over(work)
        elif not work.dirty_since_us:
            self._hooks.dirty(work)

    # -- one run

    def _begin(self, work: ActiveLease, number: int, runner: RunnerState) -> Awaitable[None] | None:
        """Start a run. None when it has ended already, else what is left to await."""
        lease = work.lease
        kind = lease.kinds[number] if lease.kinds is not None else pack.JSON
        if number in work.unwanted:
            work.end(number, run.CANCELLED, b"")
            return None
        if lease.expires_us and lease.expires_us <= self._clock.now_us():
            work.end(number, run.EXPIRED, b"")
            return None
        if kind == pack.REFERENCE:
            return self._fetched(work, number, runner)
        return self._call(work, number, runner, lease.payloads[number], kind)

    def _call(
        self, work: ActiveLease, number: int, runner: RunnerState, payload: bytes, kind: int
    ) -> Awaitable[None] | None:
        try:
            spec = self._spec(work, number)
            arguments = spec.codec.decode(payload, kind)
        except (PayloadRefused, HeadraceError) as error:
            self._refuse(work, number, "InvalidPayload", str(error))
            return None
        if spec.codec.context_name:
            runner.context = arguments[1][spec.codec.context_name] = self._context(work, number, spec)
        variables = self._variables.copy()
        if self._deadline is not None and spec.timeout_s is not None:
            self._deadline(int((monotonic() + spec.timeout_s) * 1_000_000))
        if not spec.is_async:
            if self._inline_sync:
                return self._inline(work, number, spec, variables, arguments)
            return self._threaded(work, number, runner, spec, variables, arguments)
        try:
            coro = variables.run(spec.function, *arguments[0], **arguments[1])
            waits_for = variables.run(coro.send, None)
        except StopIteration as stop:
            return self._complete(work, number, stop.value)
        except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome
            self._fail(work, number, spec, error)
            return None
        return self._waiting(work, number, runner, spec, driven(coro, variables, waits_for))

    def _spec(self, work: ActiveLease, number: int) -> TaskSpec:
        return self.registry.get(work.lease.task).with_overrides(work.lease.extras.get(work.span_slots[number]))

    def _context(self, work: ActiveLease, number: int, spec: TaskSpec) -> Context:
        lease = work.lease
        extra = lease.extras.get(work.span_slots[number])
        deadline_us = None if spec.timeout_s is None else self._clock.now_us() + int(spec.timeout_s * 1_000_000)
        return Context(
            batch_id=lease.batch_id,
            index=lease.indexes[number],
            attempt=lease.attempt,
            task=lease.task,
            queue=lease.queue,
            deadline_us=deadline_us,
            headers=extra.headers if extra is not None else None,
        )

    async def _waiting(
        self, work: ActiveLease, number: int, runner: RunnerState, spec: TaskSpec, rest: Coroutine[Any, Any, Any]
    ) -> None:
        """A run that waits: arm its timeout, drive it to its end, and tell an interruption from a failure."""
        timer = None
        if spec.timeout_s is not None:
            timer = self._clock.call_later(spec.timeout_s, partial(self._interrupt, runner, TIMEOUT))
        try:
            value = await rest
        except BaseException as error:
            if runner.reason or (isinstance(error, asyncio.CancelledError) and self._is_ending):
                raise
            self._fail(work, number, spec, error)
        else:
            offloading = self._complete(work, number, value)
            if offloading is not None:
                await offloading
        finally:
            if timer is not None:
                timer.cancel()

    def _interrupted(self, work: ActiveLease, number: int, reason: str) -> None:
        spec = self._spec(work, number)
        if work.codes[number]:
            return  # it had come to its end already
        if reason == TIMEOUT:
            self._fail(work, number, spec, TimeoutError(f"timed out after {spec.timeout_s:g} s"))
        elif reason == CANCELLED:
            work.end(number, run.CANCELLED, b"")
        elif work.lease.at_most_once:
            self._refuse(work, number, "WorkerStopped", "the worker stopped while this at-most-once run was under way")
        else:  # stopped: as if it had not begun; another worker takes it, and no attempt is charged
            work.give_back(number)

    async def _threaded(
        self,
        work: ActiveLease,
        number: int,
        runner: RunnerState,
        spec: TaskSpec,
        variables: Variables,
        arguments: Arguments,
    ) -> None:
        """A plain function runs in a thread. It can't be interrupted there: past its timeout its outcome is dropped."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="headrace-run")
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, partial(variables.run, shielded, spec.function, *arguments)
        )
        await self._waiting(work, number, runner, spec, outcome_of(future))

    def _inline(
        self, work: ActiveLease, number: int, spec: TaskSpec, variables: Variables, arguments: Arguments
    ) -> Awaitable[None] | None:
        timed = spec.timeout_s is not None and self._deadline is not None
        try:
            try:
                if timed:
                    signal.setitimer(signal.ITIMER_REAL, spec.timeout_s or 0)  # raises TimeoutError in the run
                value = variables.run(spec.function, *arguments[0], **arguments[1])
            finally:
                if timed:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome
            self._fail(work, number, spec, error)
            return None
        return self._complete(work, number, value)

    async def _fetched(self, work: ActiveLease, number: int, runner: RunnerState) -> None:
        try:
            payload, kind = await self._ask_objects(partial(self._offload.fetch, work.lease.payloads[number]))
        except HeadraceError as error:
            self._refuse(work, number, error.code, error.message)
            return
        rest = self._call(work, number, runner, payload, kind)
        if rest is not None:
            await rest

    async def _ask_objects(self, call: Callable[[], Awaitable[tuple[Any, Any]]]) -> tuple[Any, Any]:
        return await retry_transient(call, self._clock, what="the object store")

    # -- how it ended

    def _complete(self, work: ActiveLease, number: int, value: Any) -> Awaitable[None] | None:
        try:
            result = self._encode(value)
        except Exception as error:  # noqa: BLE001 - a result's own code may raise anything
            self._refuse(work, number, "InvalidResult", f"the result can't be written as JSON: {error_line(error)}")
            return None
        if len(result) >= self._inline_bytes_max:
            return self._store_result(work, number, result)
        work.end(number, run.COMPLETED, result)
        return None

    async def _store_result(self, work: ActiveLease, number: int, result: bytes) -> None:
        try:
            put = partial(self._offload.put_result, work.lease.batch_id, result)
            reference, key = await self._ask_objects(put)
        except HeadraceError as error:
            self._refuse(work, number, error.code, error.message)
            return
        work.end(number, run.COMPLETED, reference, kind=pack.REFERENCE, object_key=key)

    def _refuse(self, work: ActiveLease, number: int, kind: str, message: str) -> None:
        """Fail for good: another attempt would end the same way."""
        message = message[: self._error_chars_max]
        failure = Failure(type=kind, message=message, attempts=work.lease.attempt, crashes=work.lease.crashes_count)
        work.end(number, run.FAILED, failure.encode())

    def _fail(self, work: ActiveLease, number: int, spec: TaskSpec, error: BaseException) -> None:
        """A failed attempt: another one if the policy says so."""
        lease = work.lease
        kind, message, trace = describe(error, chars_max=self._error_chars_max)
        failure = Failure(type=kind, message=message, attempts=lease.attempt, crashes=lease.crashes_count, trace=trace)
        due_us = retry_at_us(
            spec.retry, attempt=lease.attempt, error=error, now_us=self._clock.now_us(), random=self._random
        )
        if due_us is None or lease.at_most_once:
            work.end(number, run.FAILED, failure.encode())
        else:
            work.end(number, RETRY, failure.encode(), due_us=due_us)
