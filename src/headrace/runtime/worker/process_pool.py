"""A pool of child processes that execute claimed runs.

The parent owns the session, the leases and the store; a child gets slices of leases and returns outcomes. When a child
ends unexpectedly, its in-flight marks say which runs it had begun. Only those are suspects and are charged a crash.
From the second crash on they execute alone, until the run that ends its process is found.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Final

from headrace.core import run
from headrace.core.failure import Failure
from headrace.core.retry import retry_at_us
from headrace.core.span import RETRY
from headrace.foundation import logs
from headrace.foundation.errors import HeadraceError, InvalidSetting
from headrace.foundation.logs import get_logger
from headrace.runtime.engine import Engine
from headrace.runtime.sessions.active_lease import BEGUN, NOT_BEGUN, ActiveLease, RetractedRuns, retract
from headrace.runtime.sessions.inflight_marks import SLOTS, read, read_deadline, remove
from headrace.runtime.sessions.session import StoreSession
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.worker.executor import SUSPECT_CRASHES, ExecutorCallbacks
from headrace.runtime.worker.failure_log import FailureLog
from headrace.runtime.worker.parent_objects import answer_of
from headrace.runtime.worker.process_ipc import (
    HEADER,
    ChildFailed,
    ChildReady,
    ChildSetup,
    FetchObject,
    FromChild,
    InterruptRuns,
    LeaseSlice,
    PutResult,
    SliceOutcomes,
    StopChild,
    ToChild,
    framed,
    from_child,
)
from headrace.runtime.worker.run_driver import CANCELLED

LOG: Any = get_logger("headrace.processes")
SLICE_S: Final = 0.05
KILL_AFTER_S: Final = 2.0
START_TIMEOUT_S: Final = 60.0
BACKOFF_S: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)


class _DispatchedSlice:
    """A slice of a lease that a child executes: the lease, and the lease offsets of its runs."""

    __slots__ = ("active", "numbers")

    def __init__(self, active: ActiveLease, numbers: range) -> None:
        self.active = active
        self.numbers = numbers


class _ChildProcess:
    """One child process, as the parent sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.reader = asyncio.StreamReader()
        self.writer: asyncio.StreamWriter | None = None
        self.marks_path = Path()
        self.slices: dict[int, _DispatchedSlice] = {}
        self.outstanding_count = 0
        self.ended_count = 0
        self.is_ready = False
        self.is_alone = False
        self.since_s = monotonic()
        self.rate = 0.0

    def measure(self) -> None:
        """Update the rate, in runs per second, over windows of a slice's length."""
        elapsed_s = monotonic() - self.since_s
        if elapsed_s >= SLICE_S:
            rate = self.ended_count / elapsed_s
            self.rate = rate if rate > self.rate else (self.rate + rate) / 2
            self.since_s, self.ended_count = monotonic(), 0


class ProcessPool:
    """Child processes and the leases that wait for them. Same interface as `Executor`."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        session: StoreSession,
        *,
        names: list[str],
        processes: int,
        concurrency: int,
        hooks: ExecutorCallbacks,
        settings: Mapping[str, str | int],
    ) -> None:
        """`names`: the tasks that run in the pool; `processes`: number of children, 0 for one per core; `settings`:
        those of the app, which its tasks may use.
        """
        self._settings = dict(settings)
        self._engine = engine
        self._registry = registry
        self._session = session
        self._hooks = hooks
        self._count = processes or os.cpu_count() or 1
        self._names = names
        self._is_one_run_each = all(registry.get(name).pool == "process" for name in names)
        self._per_child = 1 if self._is_one_run_each else -(-concurrency // self._count)
        self.concurrency = self._per_child * self._count
        self.unbegun_count = 0
        self.in_flight_count = 0
        self.waiting_count = 0  # a run in a child process keeps its slot while it waits
        self.ended_count = 0
        self._children = [_ChildProcess(number) for number in range(self._count)]
        self._ready: deque[ActiveLease] = deque()
        self._suspects: deque[ActiveLease] = deque()
        self._open_slices: dict[ActiveLease, int] = {}
        self._interrupted_leases: set[ActiveLease] = set()
        self._failure_log = FailureLog(engine.clock)
        self._next_slice_id = 1
        self._launches_count = 0
        self._is_stopping = False
        self._keepers: list[asyncio.Task[None]] = []
        self._answers: set[asyncio.Future[None]] = set()
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    async def start(self) -> None:
        """Start all children. Raises `InvalidSetting` if they can't load their tasks."""
        if self._engine.live_directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="headrace-")
        try:
            async with asyncio.TaskGroup() as group:
                for child in self._children:
                    group.create_task(self._launch(child))
        except BaseExceptionGroup as errors:
            await self._end_children()
            raise errors.exceptions[0] from None
        except BaseException:
            await self._end_children()
            raise
        self._keepers = [asyncio.create_task(self._supervise(child)) for child in self._children]
        self._keepers.append(asyncio.create_task(self._watch_deadlines()))

    # -- leases in and out

    def submit(self, active: ActiveLease) -> None:
        """Queue the runs of a lease."""
        self.unbegun_count += active.unbegun_count
        (self._suspects if active.lease.crashes_count >= SUSPECT_CRASHES else self._ready).append(active)
        self._dispatch_all()

    def take_unbegun(self) -> list[ActiveLease]:
        """Give up all runs that no child was given; return their leases."""
        leases = [active for active in (*self._ready, *self._suspects) if active.unbegun_count]
        self._ready.clear()
        self._suspects.clear()
        self.unbegun_count = 0
        return leases

    def retract(self, runs_count: int) -> RetractedRuns:
        """Give up at most `runs_count` runs that have not begun, the last first."""
        retracted = retract(self._ready, runs_count)
        self.unbegun_count -= retracted.runs_count
        return retracted

    def interrupt(self, is_selected: Callable[[ActiveLease, int], bool], reason: str) -> None:
        """Interrupt the runs that `is_selected` names by lease and offset.

        Runs that no child was given end here if all of their lease's are selected. In a child, only runs that wait or
        have not begun can be interrupted.
        """
        if reason == CANCELLED:
            for active in (*self._ready, *self._suspects):
                self._cancel_unbegun(active, is_selected)
        for child in self._children:
            for slice_id, slice_ in child.slices.items():
                numbers = [at for at, number in enumerate(slice_.numbers) if is_selected(slice_.active, number)]
                if numbers:
                    self._send(child, InterruptRuns(slice_id, numbers))

    def _cancel_unbegun(self, active: ActiveLease, is_selected: Callable[[ActiveLease, int], bool]) -> None:
        unbegun = range(active.cursor, active.count)
        if not unbegun or not all(is_selected(active, lease_offset) for lease_offset in unbegun):
            return
        self.unbegun_count -= len(unbegun)
        for lease_offset in unbegun:
            active.end(lease_offset, run.CANCELLED, b"")
        active.cursor = active.count
        if not self._open_slices.get(active):
            self._hooks.over(active)

    def rename_marks(self) -> None:
        """Rename the marks of all children after the session's id; a child whose marks are gone is replaced."""
        for child in self._children:
            path = child.marks_path.with_name(self._marks_name(child))
            try:
                child.marks_path = child.marks_path.rename(path)
            except OSError:
                self._kill(child)

    def _marks_name(self, child: _ChildProcess) -> str:
        self._launches_count += 1
        return f"{self._session.session_id}.{child.number}-{self._launches_count}"

    async def stop(self, *, grace_s: float) -> None:
        """Begin no run, let children end those in flight within `grace_s`, then end the children."""
        self._is_stopping = True
        for child in self._children:
            self._send(child, StopChild(grace_s))
        keepers = self._keepers[:-1]
        if keepers:
            self._keepers[-1].cancel()
            await asyncio.wait(keepers, timeout=grace_s + KILL_AFTER_S)
        for child in self._children:
            self._kill(child)
        if keepers:
            await asyncio.wait(keepers, timeout=KILL_AFTER_S)
        for keeper in self._keepers:
            keeper.cancel()
        for answer in self._answers:
            answer.cancel()
        await asyncio.gather(*self._keepers, *self._answers, return_exceptions=True)
        await self._end_children()

    async def _end_children(self) -> None:
        for child in self._children:
            child.is_ready = False
            self._kill(child)
            if child.writer is not None:
                child.writer.close()
            if child.process is not None:
                await child.process.wait()
            remove([child.marks_path] if child.marks_path.name else [])
        if self._directory is not None:
            self._directory.cleanup()

    # -- dispatching

    def _dispatch_all(self) -> None:
        for child in self._children:
            self._dispatch(child)

    def _dispatch(self, child: _ChildProcess) -> None:
        """Send a child as many runs as it can execute in a slice; a suspect alone, to a child without runs."""
        while child.is_ready and not self._is_stopping and not child.is_alone:
            if self._suspects:
                if child.outstanding_count:
                    return  # first it finishes its runs; then it gets the suspects
                active = self._suspects.popleft()
                child.is_alone = True
                self._send_slice(child, active, active.unbegun_count)
                return
            while self._ready and not self._ready[0].unbegun_count:
                self._ready.popleft()
            child.measure()
            free_count = self._per_child + int(child.rate * SLICE_S) - child.outstanding_count
            if not self._ready or free_count <= 0 or len(child.slices) >= SLOTS:
                return
            self._send_slice(child, self._ready[0], free_count)

    def _send_slice(self, child: _ChildProcess, active: ActiveLease, runs_max: int) -> None:
        first = active.cursor
        active.cursor = min(active.count, first + runs_max)
        numbers = range(first, active.cursor)
        lease = active.lease
        span_slots = [active.span_slots[number] for number in numbers]
        slice_id, self._next_slice_id = self._next_slice_id, self._next_slice_id + 1
        child.slices[slice_id] = _DispatchedSlice(active, numbers)
        child.outstanding_count += len(numbers)
        self.unbegun_count -= len(numbers)
        self.in_flight_count += len(numbers)
        self._open_slices[active] = self._open_slices.get(active, 0) + 1
        if lease.at_most_once:  # a dispatched run may have begun, for a process that finds only the parent's marks
            for span_slot in span_slots:
                active.marks[span_slot] = BEGUN
        self._send(
            child,
            LeaseSlice(
                id=slice_id,
                span_id=lease.span_id,
                token=lease.token,
                batch_id=lease.batch_id,
                task=lease.task,
                queue=lease.queue,
                attempt=lease.attempt,
                crashes_count=lease.crashes_count,
                at_most_once=lease.at_most_once,
                expires_us=lease.expires_us,
                runs_count=lease.runs_count,
                span_slots=span_slots,
                indexes=[lease.indexes[number] for number in numbers],
                payloads=[lease.payloads[number] for number in numbers],
                kinds=None if lease.kinds is None else lease.kinds[first : active.cursor],
                extras={span_slot: lease.extras[span_slot] for span_slot in span_slots if span_slot in lease.extras},
            ),
        )

    async def _answer(self, child: _ChildProcess, request: FetchObject | PutResult) -> None:
        """Read or write an object for a child. A child that ended meanwhile gets no answer."""
        self._send(child, await answer_of(self._engine, request))

    def _send(self, child: _ChildProcess, message: ToChild) -> None:
        if child.writer is not None and not child.writer.is_closing():
            child.writer.write(framed(message))

    # -- outcomes

    def _on_outcomes(self, child: _ChildProcess, message: SliceOutcomes) -> None:
        slice_ = child.slices[message.id]
        active = slice_.active
        for number, code, result, kind, due_us, object_key in message.runs:
            active.end(slice_.numbers[number], code, result, kind=kind, due_us=due_us, object_key=object_key)
        self._account(child, len(message.runs))
        if message.over:
            self._close_slice(child, message.id)
        elif message.runs and not active.dirty_since_us:
            self._hooks.dirty(active)
        self._dispatch(child)

    def _account(self, child: _ChildProcess, runs_count: int) -> None:
        child.outstanding_count -= runs_count
        child.ended_count += runs_count
        self.in_flight_count -= runs_count
        self.ended_count += runs_count

    def _close_slice(self, child: _ChildProcess, slice_id: int, suspects: Collection[int] = ()) -> None:
        """Close a slice that a child has finished with; its lease ends if no other child has a slice of it and no run
        can begin.

        `suspects`: span slots that the child had begun and not ended when it ended; its other runs without outcome
        never began.
        """
        slice_ = child.slices.pop(slice_id)
        active = slice_.active
        returned = [number for number in slice_.numbers if not active.codes[number]]
        for number in returned:
            if active.span_slots[number] not in suspects:
                active.marks[active.span_slots[number]] = NOT_BEGUN
        child.outstanding_count -= len(returned)
        self.in_flight_count -= len(returned)
        child.is_alone = False
        self._open_slices[active] -= 1
        if self._open_slices[active]:
            return
        del self._open_slices[active]
        if active.is_over or active in self._interrupted_leases or self._is_stopping:
            self._interrupted_leases.discard(active)
            self._withdraw(active)
            self._hooks.over(active)
        elif active.ended_count and not active.dirty_since_us:
            self._hooks.dirty(active)

    def _withdraw(self, active: ActiveLease) -> None:
        """Release a lease as a whole after a child ended: its other runs will not begin here."""
        if active in self._ready:
            self._ready.remove(active)
            self.unbegun_count -= active.unbegun_count

    # -- children

    async def _launch(self, child: _ChildProcess) -> None:
        ours, theirs = socket.socketpair()
        directory = self._engine.live_directory or Path(self._directory.name if self._directory else "")
        child.marks_path = directory / self._marks_name(child)
        with theirs:
            child.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "headrace.runtime.worker.process_child", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only the parent
            )
        reader, child.writer = await asyncio.open_connection(sock=ours)
        targets = [(name, self._registry.get(name).target) for name in self._names]
        begin = ChildSetup(
            tasks=[(name, target.module, target.file, target.attribute) for name, target in targets],
            options={name: self._registry.get(name).options for name in self._names},
            paths=sys.path,
            concurrency=self._per_child,
            inline_sync=self._is_one_run_each,
            payloads_url=self._engine.payloads.shared_url,
            environment=self._engine.environment,
            marks_path=str(child.marks_path),
            limits=asdict(self._engine.limits),
            settings=self._settings,
            configures_logs=logs.is_configured() and bool(self._settings),
        )
        child.writer.write(framed(begin))
        child.reader = reader
        answer: FromChild | None = None
        reason = "it ended while it started"
        try:
            answer = await asyncio.wait_for(_next_message(reader), START_TIMEOUT_S)
        except TimeoutError:
            reason = f"it did not start within {START_TIMEOUT_S:.0f} s"
        finally:
            if not isinstance(answer, ChildReady):
                self._kill(child)
        if not isinstance(answer, ChildReady):
            reason = answer.reason if isinstance(answer, ChildFailed) else reason
            raise InvalidSetting(
                f"a child process can't load the tasks: {reason}",
                hint="check that the tasks' module can be imported by its name in a new Python process",
            )
        child.is_ready, child.is_alone = True, False

    async def _supervise(self, child: _ChildProcess) -> None:
        """Handle the outcomes of a child; when it ends, recover its runs and start another in its place."""
        failures_count = 0
        while True:
            while (message := await _next_message(child.reader)) is not None:
                if isinstance(message, SliceOutcomes):
                    failures_count = 0
                    self._on_outcomes(child, message)
                elif isinstance(message, FetchObject | PutResult):
                    answering = asyncio.ensure_future(self._answer(child, message))
                    self._answers.add(answering)
                    answering.add_done_callback(self._answers.discard)
            await self._recover_child(child)
            while not self._is_stopping:
                await self._engine.clock.sleep(BACKOFF_S[min(failures_count, len(BACKOFF_S) - 1)])
                failures_count += 1
                try:
                    await self._launch(child)
                except (HeadraceError, OSError) as error:
                    LOG.error("child.start_failed", error=str(error))
                else:
                    break
            if self._is_stopping:
                return
            self._dispatch(child)

    async def _recover_child(self, child: _ChildProcess) -> None:
        assert child.process is not None
        child.is_ready = False
        if child.writer is not None:
            child.writer.close()
        try:  # killing it now would reap it here and lose its exit status
            await asyncio.wait_for(child.process.wait(), KILL_AFTER_S)
        except TimeoutError:
            self._kill(child)  # it closed its end of the socket and can't be used any more
        crash_details = _exit_details(await child.process.wait(), child.process.pid)
        has_marks = child.marks_path.exists()
        begun, deadline_us = read(child.marks_path), read_deadline(child.marks_path)
        is_overdue = bool(deadline_us) and monotonic() * 1_000_000 > deadline_us
        remove([child.marks_path])
        if child.slices:
            LOG.warning("child.ended", evidence=crash_details, slices=len(child.slices))
        for slice_id, slice_ in list(child.slices.items()):
            active = slice_.active
            lease_offsets = {
                active.span_slots[lease_offset]: lease_offset
                for lease_offset in slice_.numbers
                if not active.codes[lease_offset]
            }
            suspects = [
                span_slot
                for span_slot in begun.get((active.lease.span_id, active.lease.token), ())
                if span_slot in lease_offsets
            ]
            if not has_marks and active.lease.at_most_once:
                suspects = list(lease_offsets)
            if is_overdue:
                for span_slot in suspects:
                    self._time_out(active, lease_offsets[span_slot])
                self._account(child, len(suspects))
            elif not self._is_stopping:
                active.suspects += suspects
                active.evidence = crash_details
            if not active.is_over:
                self._interrupted_leases.add(active)
            self._close_slice(child, slice_id, suspects)

    def _time_out(self, active: ActiveLease, lease_offset: int) -> None:
        """Record the timeout of a run that ignored it: its process was killed, which counts as no crash of the run."""
        spec = self._registry.get(active.lease.task)
        error = TimeoutError(f"timed out after {spec.timeout_s:g} s; the process was killed")
        failure = Failure(type="TimeoutError", message=str(error), attempts=active.lease.attempt)
        now_us = self._engine.clock.now_us()
        due_us = retry_at_us(spec.retry, attempt=active.lease.attempt, error=error, now_us=now_us, random=lambda: 0.5)
        if due_us is None or active.lease.at_most_once:
            active.end(lease_offset, run.FAILED, failure.encode())
            self._failure_log.write(active, lease_offset, failure)
        else:
            active.end(lease_offset, RETRY, failure.encode(), due_us=due_us)
            self._failure_log.write(active, lease_offset, failure, due_us=due_us)

    async def _watch_deadlines(self) -> None:
        while True:
            await self._engine.clock.sleep(1)
            for child in self._children:
                deadline_us = read_deadline(child.marks_path) if child.slices else 0
                if deadline_us and monotonic() * 1_000_000 > deadline_us + KILL_AFTER_S * 1_000_000:
                    self._kill(child)

    @staticmethod
    def _kill(child: _ChildProcess) -> None:
        if child.process is not None and child.process.returncode is None:
            with suppress(ProcessLookupError):  # it had ended already
                child.process.kill()


async def _next_message(reader: asyncio.StreamReader) -> FromChild | None:
    try:
        (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        message: FromChild = from_child.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message


def _exit_details(code: int, pid: int) -> str:
    if code < 0:
        signals = signal.Signals.__members__.values()
        name = next((candidate.name for candidate in signals if candidate == -code), f"signal {-code}")
        return f"process {pid} was ended by {name}"
    return f"process {pid} exited with code {code}"
