"""Runs leased work in this process.

Rule R15: a fixed set of long-lived runner coroutines takes runs from spans; a run that never waits costs no task,
no future and no log line. Rule R16: each run steps inside its own `contextvars` context. Rule R17: a timeout is
armed only when a run first waits. Rule R18: runners give the loop back every 2 ms.

Suspects (spans that shared two crashes or more) run by themselves: while one of them runs, nothing else does, so
the next crash tells.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context as Variables
from contextvars import copy_context
from time import monotonic, perf_counter
from types import coroutine
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from headrace.core import pack, run
from headrace.core.failure import Failure
from headrace.core.retry import retry_at_us
from headrace.core.span import RETRY
from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import Limits
from headrace.runtime.clock import Clock
from headrace.runtime.context import Context
from headrace.runtime.failures import describe
from headrace.runtime.registry import Registry, TaskSpec
from headrace.runtime.superjson import PayloadRefused
from headrace.runtime.work import BEGUN, ENDED, Plan, Work

SLICE_S: Final = 0.002
SUSPECT_CRASHES: Final = 2


class Offload(Protocol):
    """Where payloads and results over the inline limit live."""

    async def fetch(self, reference: bytes) -> tuple[bytes, int]:
        """What a reference refers to, and its kind."""

    async def put_result(self, batch_id: str, result: bytes) -> tuple[bytes, str]:
        """Store a result; answers the reference and the object's key."""


class Hooks(NamedTuple):
    """What the executor tells its owner: work that is over, and work whose first unsent outcome just came."""

    over: Callable[[Work], None]
    dirty: Callable[[Work], None]


async def _never(_value: Any) -> None:
    raise AssertionError


GENERAL: Final = Plan(_never, bytes)
PayloadErrors: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
BURST_RUNS: Final = 4_096


class _Runner:
    """One runner coroutine and what it is busy with."""

    __slots__ = ("context", "number", "reason", "task", "work")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.work: Work | None = None
        self.number = 0
        self.reason = ""
        self.context: Context | None = None

    def interrupt(self, reason: str) -> None:
        """Make the run that is under way end: `timeout`, `cancelled` or `stopped`."""
        if self.task is not None and self.work is not None and not self.reason:
            self.reason = reason
            if self.context is not None:
                self.context.cancel()
            self.task.cancel()


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
        offload: Offload,
        limits: Limits,
        hooks: Hooks,
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
        self._ready: deque[Work] = deque()
        self._suspects: deque[Work] = deque()
        self._alone: Work | None = None
        self._runners: list[_Runner] = []
        self._idle: list[asyncio.Future[None]] = []
        self._is_stopping = False
        self._quiet = asyncio.Event()
        self._variables = copy_context()
        self._threads: ThreadPoolExecutor | None = None
        self._encode = msgspec.json.Encoder().encode
        self._random = random.Random().random  # noqa: S311 - jitter, not secrets

    # -- work in and out

    def submit(self, work: Work) -> None:
        """Queue a lease's runs; they begin as runners get to them."""
        self.unbegun_count += work.unbegun_count
        if work.lease.crashes_count >= SUSPECT_CRASHES:
            self._suspects.append(work)
        else:
            self._ready.append(work)
        self._wake_one()

    def take_unbegun(self) -> list[Work]:
        """All work with runs that have not begun, which will not begin any more."""
        left = [
            work for work in (*self._ready, *self._suspects, self._alone) if work is not None and work.unbegun_count
        ]
        self._ready.clear()
        self._suspects.clear()
        self.unbegun_count = 0
        return left

    def interrupt(self, wanted: Callable[[Work, int], bool], reason: str) -> None:
        """Interrupt the runs under way that `wanted(work, number)` names."""
        for runner in self._runners:
            if runner.work is not None and wanted(runner.work, runner.number):
                runner.interrupt(reason)

    async def stop(self, *, grace_s: float) -> None:
        """Begin nothing more; wait `grace_s` for what is under way, then interrupt it. Twice does nothing."""
        self._is_stopping = True
        for future in self._idle:
            if not future.done():
                future.set_result(None)
        self._idle.clear()
        if self.in_flight_count:
            self._quiet.clear()
            if grace_s > 0:
                await self._clock.wait_for(self._quiet, grace_s)
            if self.in_flight_count:
                self.interrupt(lambda _work, _number: True, "stopped")
                await asyncio.wait([r.task for r in self._runners if r.task is not None], timeout=1)
        for runner in self._runners:
            if runner.task is not None and not runner.task.done():
                runner.task.cancel()
        await asyncio.gather(*[r.task for r in self._runners if r.task is not None], return_exceptions=True)
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
            runner = _Runner()
            self._runners.append(runner)
            runner.task = asyncio.create_task(self._run(runner), name=f"headrace-runner-{len(self._runners)}")

    def _next_work(self) -> Work | None:
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

    def _next_alone(self) -> Work | None:
        alone = self._alone
        if alone is not None:
            if alone.cursor < alone.count:
                return alone
            if not alone.is_over:
                return None
            self._alone = None
        if self.in_flight_count:
            return None
        if self._suspects:
            self._alone = self._suspects.popleft()
            return self._alone
        return self._next_work()

    async def _run(self, runner: _Runner) -> None:
        began = perf_counter()
        while not self._is_stopping:
            work = self._next_work()
            if work is None:
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._idle.append(future)
                await future
                began = perf_counter()
                continue
            if work.plan is None:
                work.plan = self._plan(work)
            if work.plan is not GENERAL:
                if (rest := self._burst(work, runner)) is None:
                    await asyncio.sleep(0)
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
                await self._finish(runner, rest)
                runner.work, runner.context, runner.reason = None, None, ""
                began = perf_counter()
            self._ended(work)
            if perf_counter() - began > SLICE_S:
                await asyncio.sleep(0)
                began = perf_counter()

    async def _finish(self, runner: _Runner, rest: Awaitable[None]) -> None:
        """Await the rest of a run; an interruption ends the run, not the runner."""
        work, number = runner.work, runner.number
        assert work is not None
        try:
            await rest
        except asyncio.CancelledError:
            if not runner.reason:
                work.give_back(number)
                self._ended(work)
                raise
            self._interrupted(work, number, runner.reason)
        if runner.reason and runner.task is not None:
            runner.task.uncancel()

    def _ended(self, work: Work) -> None:
        self.in_flight_count -= 1
        self.ended_count += 1
        self._report(work)
        if not self.in_flight_count:
            self._quiet.set()
            if self._suspects or self._alone is not None:
                self._wake_one()

    # -- many runs of the usual kind

    def _plan(self, work: Work) -> Plan:
        """How the runs of this lease are called: the straight way, or `GENERAL` for whatever needs a closer look."""
        lease = work.lease
        if lease.kinds is not None or lease.expires_us or lease.at_most_once or lease.task not in self.registry:
            return GENERAL
        spec = self.registry.get(lease.task)
        decode = spec.codec.decode_one
        if decode is None or not spec.is_async or spec.codec.context_name:
            return GENERAL
        return Plan(spec.function, decode)

    def _burst(self, work: Work, runner: _Runner) -> Awaitable[None] | None:
        """Run the next runs of `work` one after the other, for 2 ms at most, until one of them waits.

        None: the slice is over or the lease's runs have all begun. Else what is left to await of the last one
        begun. This is the hot path: nothing per run but what the run itself needs (rule R15).
        """
        function, decode = work.plan
        encode, inline_max = self._encode, self._inline_bytes_max
        places, marks, payloads = work.places, work.marks, work.lease.payloads
        copy_variables = self._variables.copy
        first = number = work.cursor
        stop = min(work.count, first + BURST_RUNS)
        rest: Awaitable[None] | None = None
        until = perf_counter() + SLICE_S
        while number < stop:
            place = places[number]
            marks[place] = BEGUN
            try:
                variables = copy_variables()
                coro = function(decode(payloads[number]))
                waits_for = variables.run(coro.send, None)
            except StopIteration as done:
                try:
                    result = encode(done.value)
                except (TypeError, ValueError, RecursionError):
                    result = b""
                if result and len(result) < inline_max:
                    work.codes[number] = run.COMPLETED
                    work.results[number] = result
                    marks[place] = ENDED
                    number += 1
                    if number & 15 == 0 and perf_counter() > until:
                        break
                    continue
                rest = self._complete(work, number, done.value)
            except PayloadErrors as error:
                rest = self._unusual(work, number, runner, error)
            except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome
                self._fail(work, number, self.registry.get(work.lease.task), error)
            else:
                spec = self.registry.get(work.lease.task)
                rest = self._waiting(work, number, runner, spec, _driven(coro, variables, waits_for))
            number += 1
            break
        self._account(work, number - first, rest is not None)
        return rest

    def _unusual(self, work: Work, number: int, runner: _Runner, error: BaseException) -> Awaitable[None] | None:
        """Was it the payload or the task that raised? Decode it again, the slow way, to tell."""
        spec = self.registry.get(work.lease.task)
        try:
            spec.codec.decode(work.lease.payloads[number], pack.JSON)
        except PayloadRefused:
            return self._call(work, number, runner, work.lease.payloads[number], pack.JSON)
        self._fail(work, number, spec, error)
        return None

    def _account(self, work: Work, begun_count: int, is_last_waiting: bool) -> None:
        """Count a burst: all of it began, all of it but perhaps the last has ended."""
        work.cursor += begun_count
        self.unbegun_count -= begun_count
        ended_count = begun_count - is_last_waiting
        self.in_flight_count += is_last_waiting
        self.ended_count += ended_count
        work.ended_count = work.count - work.codes.count(0)
        if ended_count:
            self._report(work)

    def _report(self, work: Work) -> None:
        if work.ended_count == work.count:
            self._hooks.over(work)
        elif not work.dirty_since_us:
            self._hooks.dirty(work)

    # -- one run

    def _begin(self, work: Work, number: int, runner: _Runner) -> Awaitable[None] | None:
        """Start a run. None when it has ended already, else what is left to await."""
        lease = work.lease
        kind = lease.kinds[number] if lease.kinds is not None else 0
        if lease.expires_us and lease.expires_us <= self._clock.now_us():
            work.end(number, run.EXPIRED, b"")
            return None
        if kind == pack.REFERENCE:
            return self._fetched(work, number, runner)
        return self._call(work, number, runner, lease.payloads[number], kind)

    def _call(self, work: Work, number: int, runner: _Runner, payload: bytes, kind: int) -> Awaitable[None] | None:
        try:
            spec = self.registry.get(work.lease.task)
            args, kwargs = spec.codec.decode(payload, kind)
        except (PayloadRefused, HeadraceError) as error:
            self._refuse(work, number, "InvalidPayload", str(error))
            return None
        if spec.codec.context_name:
            runner.context = kwargs[spec.codec.context_name] = self._context(work, number, spec)
        variables = self._variables.copy()
        if not spec.is_async:
            if self._inline_sync:
                return self._inline(work, number, spec, variables, args, kwargs)
            return self._threaded(work, number, runner, spec, variables, args, kwargs)
        try:
            coro = variables.run(spec.function, *args, **kwargs)
            waits_for = variables.run(coro.send, None)
        except StopIteration as stop:
            return self._complete(work, number, stop.value)
        except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome
            self._fail(work, number, spec, error)
            return None
        return self._waiting(work, number, runner, spec, _driven(coro, variables, waits_for))

    def _context(self, work: Work, number: int, spec: TaskSpec) -> Context:
        lease = work.lease
        extra = lease.extras.get(work.places[number])
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
        self, work: Work, number: int, runner: _Runner, spec: TaskSpec, rest: Coroutine[Any, Any, Any]
    ) -> None:
        """A run that waits: arm its timeout, drive it to its end, and tell an interruption from a failure."""
        loop = asyncio.get_running_loop()
        timer = None if spec.timeout_s is None else loop.call_later(spec.timeout_s, runner.interrupt, "timeout")
        try:
            value = await rest
        except asyncio.CancelledError as error:
            if runner.reason or self._is_stopping:
                raise
            self._fail(work, number, spec, error)  # the task cancelled itself
        except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome
            self._fail(work, number, spec, error)
        else:
            offloading = self._complete(work, number, value)
            if offloading is not None:
                await offloading
        finally:
            if timer is not None:
                timer.cancel()

    def _interrupted(self, work: Work, number: int, reason: str) -> None:
        spec = self.registry.get(work.lease.task)
        if reason == "timeout":
            self._fail(work, number, spec, TimeoutError(f"timed out after {spec.timeout_s:g} s"))
        elif reason == "cancelled":
            work.end(number, run.CANCELLED, b"")
        elif work.lease.at_most_once:
            self._refuse(work, number, "WorkerStopped", "the worker stopped while this at-most-once run was under way")
        else:  # stopped: as if it had not begun; another worker takes it, and no attempt is charged
            work.give_back(number)

    async def _threaded(
        self,
        work: Work,
        number: int,
        runner: _Runner,
        spec: TaskSpec,
        variables: Variables,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """A plain function runs in a thread. It can't be interrupted there: past its timeout its outcome is dropped."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="headrace-run")
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: variables.run(_shielded, spec.function, args, kwargs)
        )
        await self._waiting(work, number, runner, spec, _outcome(future))

    def _inline(
        self,
        work: Work,
        number: int,
        spec: TaskSpec,
        variables: Variables,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Awaitable[None] | None:
        timeout_s = spec.timeout_s
        if timeout_s is not None and self._deadline is not None:
            self._deadline(int((monotonic() + timeout_s) * 1_000_000))
            signal.setitimer(signal.ITIMER_REAL, timeout_s)  # raises TimeoutError in the run
        try:
            try:
                value = variables.run(spec.function, *args, **kwargs)
            finally:
                if timeout_s is not None and self._deadline is not None:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    self._deadline(0)
        except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome
            self._fail(work, number, spec, error)
            return None
        return self._complete(work, number, value)

    async def _fetched(self, work: Work, number: int, runner: _Runner) -> None:
        try:
            payload, kind = await self._offload.fetch(work.lease.payloads[number])
        except HeadraceError as error:
            if error.retryable:
                self._fail(work, number, self.registry.get(work.lease.task), error)
            else:
                self._refuse(work, number, error.code, error.message)
            return
        rest = self._call(work, number, runner, payload, kind)
        if rest is not None:
            await rest

    # -- how it ended

    def _complete(self, work: Work, number: int, value: Any) -> Awaitable[None] | None:
        try:
            result = self._encode(value)
        except (TypeError, ValueError, RecursionError) as error:
            self._refuse(work, number, "InvalidResult", f"the result can't be written as JSON: {error}")
            return None
        if len(result) >= self._inline_bytes_max:
            return self._store_result(work, number, result)
        work.end(number, run.COMPLETED, result)
        return None

    async def _store_result(self, work: Work, number: int, result: bytes) -> None:
        try:
            reference, key = await self._offload.put_result(work.lease.batch_id, result)
        except HeadraceError as error:
            self._fail(work, number, self.registry.get(work.lease.task), error)
            return
        work.end(number, run.COMPLETED, reference, kind=pack.REFERENCE, object_key=key)

    def _refuse(self, work: Work, number: int, kind: str, message: str) -> None:
        """Fail for good: another attempt would end the same way."""
        message = message[: self._error_chars_max]
        failure = Failure(type=kind, message=message, attempts=work.lease.attempt, crashes=work.lease.crashes_count)
        work.end(number, run.FAILED, failure.encode())

    def _fail(self, work: Work, number: int, spec: TaskSpec, error: BaseException) -> None:
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


@coroutine
def _driven(coro: Coroutine[Any, Any, Any], variables: Variables, waits_for: Any) -> Generator[Any, Any, Any]:
    """Go on with a coroutine that has begun, each step inside its own context."""
    step: Callable[[Any], Any]
    while True:
        try:
            sent = yield waits_for
        except BaseException as error:  # noqa: BLE001 - thrown on into the run, whose answer it is
            step, value = coro.throw, error
        else:
            step, value = coro.send, sent
        try:
            waits_for = variables.run(step, value)
        except StopIteration as stop:
            return stop.value


def _shielded(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A `StopIteration` can't pass through a future; as an error of the task it can."""
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("the task raised StopIteration") from error


async def _outcome(future: asyncio.Future[Any]) -> Any:
    return await asyncio.shield(future)
