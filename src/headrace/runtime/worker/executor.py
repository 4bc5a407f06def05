"""Executes the runs of leases in this process.

Rules R15 (runners are long-lived), R16 (each run has its own context), R17 (timeouts are armed at the first suspension)
and R18 (the loop is yielded every 2 ms): a run that never waits costs no task, no future, no timer and no log line.

Suspects (runs of a span that was leased during two crashes or more) execute one at a time, so that the next crash
identifies the run that caused it.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor as ThreadExecutor
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context as Variables
from contextvars import copy_context
from functools import partial
from time import monotonic, perf_counter
from typing import Any, Final, NamedTuple

from headrace.core import pack, run
from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import Limits
from headrace.foundation.logs import CURRENT_RUN, get_logger
from headrace.runtime.clock import Clock
from headrace.runtime.retrying import retry_transient
from headrace.runtime.sessions.active_lease import BEGUN, ENDED, ActiveLease, DirectCall, RetractedRuns, retract
from headrace.runtime.tasks.payload_codec import Arguments
from headrace.runtime.tasks.run_slot import CURRENT_SLOT
from headrace.runtime.tasks.superjson import PayloadRefused
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.direct_call import GENERAL_CALL, choose_call
from headrace.runtime.worker.outcome_recorder import OutcomeRecorder, PayloadAccess
from headrace.runtime.worker.run_driver import (
    CANCELLED,
    STOPPED,
    TIMEOUT,
    RunnerState,
    ThreadRun,
    await_thread,
    call_shielded,
    call_without_loop,
    context_of,
    continue_coroutine,
)
from headrace.runtime.worker.slots import THREADS_MAX, Slots
from headrace.runtime.worker.unwritten_results import LARGE_BYTES, UnwrittenResults

LOG: Any = get_logger("headrace.executor")
SLICE_S: Final = 0.002
BURST_RUNS: Final = 4_096
LOOKS_MAX: Final = 16
"""Runs between two readings of the clock, once a burst has shown that its runs are short."""
INSIST_S: Final = 5.0
STOP_S: Final = 1.0
SUSPECT_CRASHES: Final = 2


class ExecutorCallbacks(NamedTuple):
    """Callbacks to the executor's owner: a lease has ended (`over`), or has its first unsent outcome (`dirty`); a run
    has given its slot back to wait for others (`waiting`).
    """

    over: Callable[[ActiveLease], None]
    dirty: Callable[[ActiveLease], None]
    waiting: Callable[[], None] = lambda: None


class Executor:
    """Executes leased runs, at most `concurrency` at a time, and records how each ended.

    `inline_sync`: plain functions run on the event loop's own thread (in a child process that does nothing else).
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
        threads: ThreadExecutor | None = None,
        unwritten: UnwrittenResults | None = None,
    ) -> None:
        """`deadline` gets the time by which the current inline run must end, in microseconds of the monotonic clock.
        `threads`: where plain functions run; by default in a pool of `concurrency` threads.
        """
        self.registry = registry
        self.concurrency = concurrency
        self.unbegun_count = 0
        self.in_flight_count = 0
        self.ended_count = 0
        self._clock = clock
        self._offload = offload
        self._small_bytes_max = min(limits.inline_bytes_max, LARGE_BYTES)
        self._outcomes = OutcomeRecorder(clock=clock, offload=offload, limits=limits, unwritten=unwritten)
        self._hooks = hooks
        self._inline_sync = inline_sync
        self._deadline = deadline
        self._ready: deque[ActiveLease] = deque()
        self._suspects: deque[ActiveLease] = deque()
        self._isolated: ActiveLease | None = None
        self._runners: list[RunnerState] = []
        self._idle: list[asyncio.Future[None]] = []
        self._slots = Slots(concurrency, waiting_max=limits.waiting_parents_max, on_free=self._on_slot_free)
        self._is_stopping = False
        self._sentinel: asyncio.Task[bool] | None = None
        self._no_runs_in_flight = asyncio.Event()
        self._variables = copy_context()
        self._threads = threads

    @property
    def waiting_count(self) -> int:
        """Number of runs in flight that wait for other runs and have no slot."""
        return self._slots.waiting_count

    # -- leases in and out

    def submit(self, active: ActiveLease) -> None:
        """Queue the runs of a lease; they begin as runners get to them."""
        if self._sentinel is None:
            self._sentinel = asyncio.create_task(asyncio.Event().wait(), name="headrace-canary")
        self.unbegun_count += active.unbegun_count
        if active.lease.crashes_count >= SUSPECT_CRASHES:
            self._suspects.append(active)
        else:
            self._ready.append(active)
        self._wake_one()

    def take_unbegun(self) -> list[ActiveLease]:
        """Give up all runs that have not begun; return their leases."""
        leases = [
            active
            for active in (*self._ready, *self._suspects, self._isolated)
            if active is not None and active.unbegun_count
        ]
        self._ready.clear()
        self._suspects.clear()
        self._isolated = None
        self.unbegun_count = 0
        return leases

    def retract(self, runs_count: int) -> RetractedRuns:
        """Give up at most `runs_count` runs that have not begun, the last first."""
        retracted = retract(self._ready, runs_count)
        self.unbegun_count -= retracted.runs_count
        return retracted

    def interrupt(self, is_selected: Callable[[ActiveLease, int], bool], reason: str) -> None:
        """Interrupt the runs in flight that `wanted` selects by lease and offset; with CANCELLED, selected waiting runs
        never begin.
        """
        for runner in self._runners:
            if runner.active is not None and is_selected(runner.active, runner.lease_offset):
                self._interrupt(runner, reason)
        if reason != CANCELLED:
            return
        for active in (*self._ready, *self._suspects, self._isolated):
            if active is not None and (
                selected := {n for n in range(active.cursor, active.count) if is_selected(active, n)}
            ):
                active.cancelled_offsets |= selected
                active.plan = GENERAL_CALL

    def _interrupt(self, runner: RunnerState, reason: str) -> None:
        """Interrupt a run, and repeat it from time to time: a run may ignore its cancellation."""
        if runner.interrupt(reason):
            self._repeat_interrupt(runner)

    def _repeat_interrupt(self, runner: RunnerState) -> None:
        def again() -> None:
            runner.interrupt_again()
            self._repeat_interrupt(runner)

        if runner.timer is not None:
            runner.timer.cancel()
        runner.timer = self._clock.call_later(INSIST_S, again)

    async def stop(self, *, grace_s: float) -> None:
        """Begin no run; wait `grace_s` for those in flight, then interrupt them.

        A second call with a shorter grace, while the first one waits, cuts its grace short. A run that ignores its
        interruption is left running.
        """
        self._is_stopping = True
        for future in self._idle:
            if not future.done():
                future.set_result(None)
        self._idle.clear()
        if self.in_flight_count:
            self._no_runs_in_flight.clear()
            if grace_s > 0:
                await self._clock.wait_for(self._no_runs_in_flight, grace_s)
            self.interrupt(lambda _work, _number: True, STOPPED)
        if tasks := [runner.task for runner in self._runners if runner.task is not None]:
            await asyncio.wait(tasks, timeout=STOP_S)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=STOP_S)
        self._outcomes.failure_log.flush()
        if self._sentinel is not None:
            self._sentinel.cancel()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def ids_of(self, task: asyncio.Task[Any]) -> Mapping[str, object]:
        """Return the ids of the run that a runner's task executes; empty for other tasks. For any thread."""
        for runner in list(self._runners):
            if runner.task is task:
                return runner.run_ids()
        return {}

    # -- runners

    def _wake_one(self) -> None:
        """Wake an idle runner, or make one, if there is a free slot for it."""
        if self._is_stopping or not self._slots.take():
            return
        while self._idle:
            future = self._idle.pop()
            if not future.done():
                future.set_result(None)
                return
        runner = RunnerState(self._variables, self._slots)
        self._runners.append(runner)
        runner.task = asyncio.create_task(self._run(runner), name=f"headrace-runner-{len(self._runners)}")
        runner.task.add_done_callback(lambda _: self._on_runner_end(runner))

    def _on_slot_free(self) -> None:
        """Use the slot of a run that began to wait."""
        if self.unbegun_count:
            self._wake_one()
        self._hooks.waiting()

    def _on_runner_end(self, runner: RunnerState) -> None:
        """Replace a runner that ended without a stop (a `GeneratorExit` closes every task that awaits it)."""
        if not self._is_ending:
            self._runners.remove(runner)
            runner.slot.give()
            self._wake_one()

    def _next_work(self) -> ActiveLease | None:
        """Return the lease whose next run may begin, or None."""
        if self._is_stopping:
            return None
        if self._suspects or self._isolated is not None:
            return self._next_isolated()
        while self._ready:
            active = self._ready[0]
            if active.cursor < active.count:
                return active
            self._ready.popleft()
        return None

    def _next_isolated(self) -> ActiveLease | None:
        isolated = self._isolated
        if isolated is not None and isolated.cursor < isolated.count:
            return isolated
        if self.in_flight_count > self._slots.waiting_count:
            return None
        self._isolated = self._suspects.popleft() if self._suspects else None
        return self._isolated if self._isolated is not None else self._next_work()

    @property
    def _is_ending(self) -> bool:
        """True if the executor was stopped, or its event loop is ending: then all tasks are cancelled, and the sentinel
        task too.
        """
        canary = self._sentinel
        return self._is_stopping or canary is None or canary.cancelling() > 0 or canary.done()

    async def _run(self, runner: RunnerState) -> None:
        """Run until the executor ends; no run can end this loop."""
        while not self._is_stopping:
            try:
                await self._take_runs(runner)
            except asyncio.CancelledError:
                if self._is_ending:
                    raise
                runner.drop_stale_cancellations()
            except Exception:
                LOG.exception("runner.failed")

    async def _take_runs(self, runner: RunnerState) -> None:
        slots, slot, began = self._slots, runner.slot, perf_counter()
        while not self._is_stopping:
            if not slot.is_held:
                slot.is_held = slots.take()
            active = None if slots.resuming or not slot.is_held else self._next_work()
            if active is None:
                await self._wait_for_work(runner)
                began = perf_counter()
                continue
            plan = active.plan or choose_call(active, self.registry, has_deadline=self._deadline is not None)
            if plan is not GENERAL_CALL:
                if (remainder := self._burst(active, plan, runner)) is None:
                    await self._yield_to_loop(runner)
                    continue
                lease_offset = active.cursor - 1
            else:
                lease_offset = active.begin()
                self.unbegun_count -= 1
                self.in_flight_count += 1
                runner.active, runner.lease_offset = active, lease_offset
                remainder = self._begin(active, lease_offset, runner)
            if remainder is not None:
                runner.active, runner.lease_offset = active, lease_offset
                if self.unbegun_count:
                    self._wake_one()
                try:
                    await self._finish(runner, remainder)
                finally:
                    runner.clear()
                    self._ended(active)
                began = perf_counter()
            else:
                runner.clear()
                self._ended(active)
            if runner.has_stale_cancellation or perf_counter() - began > SLICE_S:
                await self._yield_to_loop(runner)
                began = perf_counter()

    async def _wait_for_work(self, runner: RunnerState) -> None:
        """Give the slot away and wait for another one, and work with it."""
        runner.slot.give()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(future)
        try:
            await future
        finally:
            runner.slot.is_held = future.done() and not future.cancelled()

    async def _yield_to_loop(self, runner: RunnerState) -> None:
        """Yield to the event loop, and absorb a cancellation that a finished run left behind."""
        try:
            runner.drop_stale_cancellations()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            if self._is_ending:
                raise
            runner.drop_stale_cancellations()

    async def _finish(self, runner: RunnerState, remainder: Awaitable[None]) -> None:
        """Await the rest of a run; an interruption ends the run, not the runner."""
        active, lease_offset = runner.active, runner.lease_offset
        assert active is not None
        try:
            await remainder
        except BaseException as error:
            if runner.reason:
                self._record_interruption(active, lease_offset, runner.reason)
            elif isinstance(error, asyncio.CancelledError) and self._is_ending:
                self._record_interruption(active, lease_offset, STOPPED)
                raise
            else:
                self._outcomes.fail(active, lease_offset, self._spec(active, lease_offset), error)

    def _ended(self, active: ActiveLease) -> None:
        self.in_flight_count -= 1
        self.ended_count += 1
        if self._deadline is not None:
            self._deadline(0)
        self._report(active)
        if not self.in_flight_count:
            self._no_runs_in_flight.set()
        if self.in_flight_count <= self._slots.waiting_count and (self._suspects or self._isolated is not None):
            self._wake_one()

    # -- many direct calls

    def _burst(self, active: ActiveLease, plan: DirectCall, runner: RunnerState) -> Awaitable[None] | None:
        """Execute the next runs of a lease one after the other, for 2 ms at most, until one of them waits.

        Returns None when the slice is over or all runs of the lease have begun; otherwise the rest of the last run.
        This is the hot path: nothing per run except what the run needs (R15, long-lived runners).
        """
        function, decode, plain_types, validate, checks_values, check_values = plan
        encode, small_max = self._outcomes.encode, self._small_bytes_max
        span_slots, marks, payloads = active.span_slots, active.marks, active.lease.payloads
        copy_variables, runner.active = runner.variables.copy, active
        first = lease_offset = active.cursor
        stop = min(active.count, first + BURST_RUNS)
        remainder: Awaitable[None] | None = None
        until, look_at, step = perf_counter() + SLICE_S, lease_offset + 1, 1
        while lease_offset < stop and remainder is None:
            span_slot = span_slots[lease_offset]
            runner.lease_offset = lease_offset
            marks[span_slot] = BEGUN
            try:
                argument = decode(payloads[lease_offset])
            except Exception:  # noqa: BLE001 - decoded again, the slow way, it says why
                remainder = self._call(active, lease_offset, runner, payloads[lease_offset], pack.JSON)
                lease_offset += 1
                break
            try:
                variables = copy_variables()
                coro = function(argument)
                waits_for = variables.run(coro.send, None)
            except StopIteration as done:
                value = done.value
                try:
                    result = encode(value)
                    if type(value) not in plain_types:
                        validate(result)
                        if checks_values and (checks_values > 1 or b"null" in result):
                            check_values(value, result)
                except Exception:  # noqa: BLE001 - encoded again, the slow way, it says why
                    result = b""
                if result and len(result) < small_max:
                    active.codes[lease_offset] = run.COMPLETED
                    active.results[lease_offset] = result
                    marks[span_slot] = ENDED
                    lease_offset += 1
                    if lease_offset >= look_at:
                        if perf_counter() > until:
                            break
                        step = min(2 * step, LOOKS_MAX)
                        look_at = lease_offset + step
                    continue
                remainder = self._outcomes.complete(
                    active, lease_offset, value, self.registry.get(active.lease.task).codec.results
                )
            except BaseException as error:  # noqa: BLE001 - every exception of a task is its outcome
                self._outcomes.fail(active, lease_offset, self._spec(active, lease_offset), error)
            else:
                spec = self.registry.get(active.lease.task)
                remainder = self._await_run(
                    active, lease_offset, runner, spec, continue_coroutine(coro, variables, waits_for)
                )
            lease_offset += 1
            stop = lease_offset if perf_counter() > until else stop  # a failed run took long enough to look at the time
        runner.active = None
        self._account(active, lease_offset - first, remainder is not None)
        return remainder

    def _account(self, active: ActiveLease, begun_count: int, is_last_waiting: bool) -> None:
        """Count a burst: all of its runs have begun, and all but perhaps the last have ended."""
        active.cursor += begun_count
        self.unbegun_count -= begun_count
        ended_count = begun_count - is_last_waiting
        self.in_flight_count += is_last_waiting
        self.ended_count += ended_count
        active.ended_count = active.count - active.codes.count(0)
        if ended_count:
            self._report(active)

    def _report(self, active: ActiveLease) -> None:
        if active.ended_count == active.count:
            self._hooks.over(active)
        elif not active.dirty_since_us:
            self._hooks.dirty(active)

    # -- one run

    def _begin(self, active: ActiveLease, lease_offset: int, runner: RunnerState) -> Awaitable[None] | None:
        """Start a run. Return None if it has ended already, otherwise the awaitable for the rest."""
        lease = active.lease
        kind = lease.kinds[lease_offset] if lease.kinds is not None else pack.JSON
        if lease_offset in active.cancelled_offsets:
            active.end(lease_offset, run.CANCELLED, b"")
            return None
        if lease.expires_us and lease.expires_us <= self._clock.now_us():
            active.end(lease_offset, run.EXPIRED, b"")
            return None
        if kind == pack.REFERENCE:
            return self._fetch_and_call(active, lease_offset, runner)
        return self._call(active, lease_offset, runner, lease.payloads[lease_offset], kind)

    def _call(
        self, active: ActiveLease, lease_offset: int, runner: RunnerState, payload: bytes, kind: int
    ) -> Awaitable[None] | None:
        try:
            spec = self._spec(active, lease_offset)
            arguments = spec.codec.decode(payload, kind)
        except (PayloadRefused, HeadraceError) as error:
            self._outcomes.fail_for_good(active, lease_offset, "InvalidPayload", str(error))
            return None
        if spec.codec.context_name:
            runner.context = arguments[1][spec.codec.context_name] = context_of(active, lease_offset, spec, self._clock)
        variables = runner.variables.copy()
        if self._deadline is not None and spec.timeout_s is not None:
            self._deadline(int((monotonic() + spec.timeout_s) * 1_000_000))
        if not spec.is_async:
            if self._inline_sync:
                return self._call_inline(active, lease_offset, spec, variables, arguments)
            return self._call_in_thread(active, lease_offset, runner, spec, variables, arguments)
        try:
            coro = variables.run(spec.function, *arguments[0], **arguments[1])
            waits_for = variables.run(coro.send, None)
        except StopIteration as stop:
            return self._outcomes.complete(active, lease_offset, stop.value, spec.codec.results)
        except BaseException as error:  # noqa: BLE001 - every exception of a task is its outcome
            self._outcomes.fail(active, lease_offset, spec, error)
            return None
        return self._await_run(active, lease_offset, runner, spec, continue_coroutine(coro, variables, waits_for))

    def _spec(self, active: ActiveLease, lease_offset: int) -> TaskSpec:
        return self.registry.get(active.lease.task).with_overrides(
            active.lease.extras.get(active.span_slots[lease_offset])
        )

    async def _await_run(
        self,
        active: ActiveLease,
        lease_offset: int,
        runner: RunnerState,
        spec: TaskSpec,
        remainder: Coroutine[Any, Any, Any],
    ) -> None:
        """Arm the timeout of a run that waits, run it to its end, and distinguish an interruption from a failure."""
        timer = None
        if spec.timeout_s is not None:
            timer = self._clock.call_later(spec.timeout_s, partial(self._interrupt, runner, TIMEOUT))
        try:
            value = await remainder
        except BaseException as error:
            if runner.reason or (isinstance(error, asyncio.CancelledError) and self._is_ending):
                raise
            self._outcomes.fail(active, lease_offset, spec, error)
        else:
            offloading = self._outcomes.complete(active, lease_offset, value, spec.codec.results)
            if offloading is not None:
                await offloading
        finally:
            if timer is not None:
                timer.cancel()

    def _record_interruption(self, active: ActiveLease, lease_offset: int, reason: str) -> None:
        spec = self._spec(active, lease_offset)
        if active.codes[lease_offset]:
            return  # it had ended already
        if reason == TIMEOUT:
            self._outcomes.fail(active, lease_offset, spec, TimeoutError(f"timed out after {spec.timeout_s:g} s"))
        elif reason == CANCELLED:
            active.end(lease_offset, run.CANCELLED, b"")
        elif active.lease.at_most_once:
            self._outcomes.fail_for_good(
                active, lease_offset, "WorkerStopped", "the worker stopped while this at-most-once run was in flight"
            )
        else:  # stopped: it counts as not begun; another worker executes it, and no attempt is charged
            active.mark_not_begun(lease_offset)

    async def _call_in_thread(
        self,
        active: ActiveLease,
        lease_offset: int,
        runner: RunnerState,
        spec: TaskSpec,
        variables: Variables,
        arguments: Arguments,
    ) -> None:
        """Run a plain function in a thread. It can't be interrupted there: after its timeout its outcome is
        discarded.
        """
        variables.run(CURRENT_RUN.set, ThreadRun(active, lease_offset))
        variables.run(CURRENT_SLOT.set, runner.slot.of_thread())
        if self._threads is None:
            threads_max = self.concurrency + min(self._slots.waiting_max, THREADS_MAX)  # each is made when it is needed
            self._threads = ThreadPoolExecutor(threads_max, thread_name_prefix="headrace-run")
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, partial(variables.run, call_shielded, spec.function, *arguments)
        )
        await self._await_run(active, lease_offset, runner, spec, await_thread(future))

    def _call_inline(
        self, active: ActiveLease, lease_offset: int, spec: TaskSpec, variables: Variables, arguments: Arguments
    ) -> Awaitable[None] | None:
        timed = spec.timeout_s is not None and self._deadline is not None
        try:
            try:
                if timed:
                    signal.setitimer(signal.ITIMER_REAL, spec.timeout_s or 0)  # raises TimeoutError inside the run
                value = variables.run(call_without_loop, spec.function, *arguments)
            finally:
                if timed:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:  # noqa: BLE001 - every exception of a task is its outcome
            self._outcomes.fail(active, lease_offset, spec, error)
            return None
        return self._outcomes.complete(active, lease_offset, value, spec.codec.results)

    async def _fetch_and_call(self, active: ActiveLease, lease_offset: int, runner: RunnerState) -> None:
        try:
            payload, kind = await retry_transient(
                partial(self._offload.fetch, active.lease.payloads[lease_offset]), self._clock, what="the object store"
            )
        except HeadraceError as error:
            self._outcomes.fail_for_good(active, lease_offset, error.code, error.message)
            return
        remainder = self._call(active, lease_offset, runner, payload, kind)
        if remainder is not None:
            await remainder
