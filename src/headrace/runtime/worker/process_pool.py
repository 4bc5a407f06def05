"""A crew of child processes that run claimed work.

The parent keeps the session, the leases and the store; a child gets slices of leases and answers outcomes. When
a child dies, the marks it left in memory say which runs it had begun: only those are suspects, they are charged a
crash, and from the second one on they run alone until the one that kills is found.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Final

import structlog

from headrace.core import run
from headrace.core.failure import Failure
from headrace.core.retry import retry_at_us
from headrace.core.span import RETRY
from headrace.foundation.errors import HeadraceError, InvalidSetting
from headrace.foundation.limits import TABLE
from headrace.runtime.engine import Engine
from headrace.runtime.sessions.active_lease import BEGUN, NOT_BEGUN, ActiveLease, RetractedRuns, retract
from headrace.runtime.sessions.inflight_marks import SLOTS, read, read_deadline, remove
from headrace.runtime.sessions.session import StoreSession
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.worker.executor import SUSPECT_CRASHES, ExecutorCallbacks
from headrace.runtime.worker.process_ipc import (
    HEADER,
    ChildFailed,
    ChildReady,
    ChildSetup,
    InterruptRuns,
    LeaseSlice,
    SliceOutcomes,
    StopChild,
    framed,
    from_child,
)
from headrace.runtime.worker.run_driver import CANCELLED

LOG: Any = structlog.get_logger("headrace.processes")
SLICE_S: Final = 0.05
KILL_AFTER_S: Final = 2.0
START_TIMEOUT_S: Final = 60.0
BACKOFF_S: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)


class _DispatchedSlice:
    """A slice in a child: which numbers of which work."""

    __slots__ = ("numbers", "work")

    def __init__(self, work: ActiveLease, numbers: range) -> None:
        self.work = work
        self.numbers = numbers


class _ChildProcess:
    """One child process as the parent sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.reader = asyncio.StreamReader()
        self.writer: asyncio.StreamWriter | None = None
        self.marks_path = Path()
        self.parts: dict[int, _DispatchedSlice] = {}
        self.outstanding_count = 0
        self.ended_count = 0
        self.is_ready = False
        self.is_alone = False
        self.since_s = monotonic()
        self.rate = 0.0

    def measure(self) -> None:
        """Runs a second, over windows of a slice's length."""
        elapsed_s = monotonic() - self.since_s
        if elapsed_s >= SLICE_S:
            rate = self.ended_count / elapsed_s
            self.rate = rate if rate > self.rate else (self.rate + rate) / 2
            self.since_s, self.ended_count = monotonic(), 0


class ProcessPool:
    """Child processes and the work that waits for them. Same face as `Executor`."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        broker: StoreSession,
        *,
        names: list[str],
        processes: int,
        concurrency: int,
        hooks: ExecutorCallbacks,
    ) -> None:
        """`names`: the tasks that run here; `processes`: how many children, 0 for one a core."""
        self._engine = engine
        self._registry = registry
        self._broker = broker
        self._hooks = hooks
        self._count = processes or os.cpu_count() or 1
        self._names = names
        self._alone_each = all(registry.get(name).pool == "process" for name in names)
        self._per_child = 1 if self._alone_each else -(-concurrency // self._count)
        self.concurrency = self._per_child * self._count
        self.unbegun_count = 0
        self.in_flight_count = 0
        self.ended_count = 0
        self._children = [_ChildProcess(number) for number in range(self._count)]
        self._ready: deque[ActiveLease] = deque()
        self._suspects: deque[ActiveLease] = deque()
        self._open_parts: dict[ActiveLease, int] = {}
        self._broken: set[ActiveLease] = set()
        self._next_slice_id = 1
        self._launches_count = 0
        self._is_stopping = False
        self._keepers: list[asyncio.Task[None]] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    async def start(self) -> None:
        """Start every child; raises `InvalidSetting` when they can't have their tasks."""
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
        self._keepers = [asyncio.create_task(self._keep(child)) for child in self._children]
        self._keepers.append(asyncio.create_task(self._watch_deadlines()))

    # -- work in and out

    def submit(self, work: ActiveLease) -> None:
        """Queue a lease's runs."""
        self.unbegun_count += work.unbegun_count
        (self._suspects if work.lease.crashes_count >= SUSPECT_CRASHES else self._ready).append(work)
        self._dispatch_all()

    def take_unbegun(self) -> list[ActiveLease]:
        """All work that has runs no child was given; they will not begin any more."""
        left = [work for work in (*self._ready, *self._suspects) if work.unbegun_count]
        self._ready.clear()
        self._suspects.clear()
        self.unbegun_count = 0
        return left

    def retract(self, runs_count: int) -> RetractedRuns:
        """Let go of runs that nobody has begun, at most `runs_count`, the last first."""
        retracted = retract(self._ready, runs_count)
        self.unbegun_count -= retracted.runs_count
        return retracted

    def interrupt(self, wanted: Callable[[ActiveLease, int], bool], reason: str) -> None:
        """Interrupt runs that `wanted(work, number)` names; those nobody was given end here when all of them are named.

        In a child only those that wait, or did not begin, can hear it.
        """
        if reason == CANCELLED:
            for work in (*self._ready, *self._suspects):
                self._cancel_unbegun(work, wanted)
        for child in self._children:
            for slice_id, part in child.parts.items():
                numbers = [at for at, number in enumerate(part.numbers) if wanted(part.work, number)]
                if numbers:
                    self._send(child, InterruptRuns(slice_id, numbers))

    def _cancel_unbegun(self, work: ActiveLease, wanted: Callable[[ActiveLease, int], bool]) -> None:
        rest = range(work.cursor, work.count)
        if not rest or not all(wanted(work, number) for number in rest):
            return
        self.unbegun_count -= len(rest)
        for number in rest:
            work.end(number, run.CANCELLED, b"")
        work.cursor = work.count
        if not self._open_parts.get(work):
            self._hooks.over(work)

    def rename_marks(self) -> None:
        """The session has a new id: evidence of children is found by it. A child whose evidence is gone is replaced."""
        for child in self._children:
            path = child.marks_path.with_name(self._marks_name(child))
            try:
                child.marks_path = child.marks_path.rename(path)
            except OSError:
                self._kill(child)

    def _marks_name(self, child: _ChildProcess) -> str:
        self._launches_count += 1
        return f"{self._broker.session_id}.{child.number}-{self._launches_count}"

    async def stop(self, *, grace_s: float) -> None:
        """Begin nothing more, let children end what is under way within `grace_s`, then end them."""
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
        await asyncio.gather(*self._keepers, return_exceptions=True)
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

    # -- handing out

    def _dispatch_all(self) -> None:
        for child in self._children:
            self._dispatch(child)

    def _dispatch(self, child: _ChildProcess) -> None:
        """Give a child as much as keeps it busy for a slice's time; suspects alone, to a child with nothing else."""
        while child.is_ready and not self._is_stopping and not child.is_alone:
            if self._suspects:
                if child.outstanding_count:
                    return  # it drains; then the suspects are its
                work = self._suspects.popleft()
                child.is_alone = True
                self._give(child, work, work.unbegun_count)
                return
            while self._ready and not self._ready[0].unbegun_count:
                self._ready.popleft()
            child.measure()
            room = self._per_child + int(child.rate * SLICE_S) - child.outstanding_count
            if not self._ready or room <= 0 or len(child.parts) >= SLOTS:
                return
            self._give(child, self._ready[0], room)

    def _give(self, child: _ChildProcess, work: ActiveLease, runs_max: int) -> None:
        first = work.cursor
        work.cursor = min(work.count, first + runs_max)
        numbers = range(first, work.cursor)
        lease = work.lease
        span_slots = [work.span_slots[number] for number in numbers]
        slice_id, self._next_slice_id = self._next_slice_id, self._next_slice_id + 1
        child.parts[slice_id] = _DispatchedSlice(work, numbers)
        child.outstanding_count += len(numbers)
        self.unbegun_count -= len(numbers)
        self.in_flight_count += len(numbers)
        self._open_parts[work] = self._open_parts.get(work, 0) + 1
        if lease.at_most_once:  # handed out may be begun, for whoever finds only this process's marks
            for span_slot in span_slots:
                work.marks[span_slot] = BEGUN
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
                kinds=None if lease.kinds is None else lease.kinds[first : work.cursor],
                extras={span_slot: lease.extras[span_slot] for span_slot in span_slots if span_slot in lease.extras},
            ),
        )

    def _send(self, child: _ChildProcess, message: LeaseSlice | InterruptRuns | StopChild) -> None:
        if child.writer is not None and not child.writer.is_closing():
            child.writer.write(framed(message))

    # -- outcomes

    def _ended(self, child: _ChildProcess, message: SliceOutcomes) -> None:
        part = child.parts[message.id]
        work = part.work
        for number, code, result, kind, due_us, object_key in message.runs:
            work.end(part.numbers[number], code, result, kind=kind, due_us=due_us, object_key=object_key)
        self._account(child, len(message.runs))
        if message.over:
            self._close_part(child, message.id)
        elif message.runs and not work.dirty_since_us:
            self._hooks.dirty(work)
        self._dispatch(child)

    def _account(self, child: _ChildProcess, runs_count: int) -> None:
        child.outstanding_count -= runs_count
        child.ended_count += runs_count
        self.in_flight_count -= runs_count
        self.ended_count += runs_count

    def _close_part(self, child: _ChildProcess, slice_id: int, suspects: Collection[int] = ()) -> None:
        """A child is done with a slice; its work is over when no other child has one and none can begin.

        `suspects`: places the child had begun and not ended when it died; the others without an outcome never began.
        """
        part = child.parts.pop(slice_id)
        work = part.work
        returned = [number for number in part.numbers if not work.codes[number]]
        for number in returned:
            if work.span_slots[number] not in suspects:
                work.marks[work.span_slots[number]] = NOT_BEGUN
        child.outstanding_count -= len(returned)
        self.in_flight_count -= len(returned)
        child.is_alone = False
        self._open_parts[work] -= 1
        if self._open_parts[work]:
            return
        del self._open_parts[work]
        if work.is_over or work in self._broken or self._is_stopping:
            self._broken.discard(work)
            self._withdraw(work)
            self._hooks.over(work)
        elif work.ended_count and not work.dirty_since_us:
            self._hooks.dirty(work)

    def _withdraw(self, work: ActiveLease) -> None:
        """A broken lease goes back whole: what of it has not begun will not begin here."""
        if work in self._ready:
            self._ready.remove(work)
            self.unbegun_count -= work.unbegun_count

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
            inline_sync=self._alone_each,
            payloads_url=self._engine.payloads.url,
            environment=self._engine.environment,
            marks_path=str(child.marks_path),
            limits=self._limits_of_child(),
        )
        child.writer.write(framed(begin))
        child.reader = reader
        answer: SliceOutcomes | ChildReady | ChildFailed | None = None
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
            raise InvalidSetting(f"a child process can't run these tasks: {reason}", hint="import the module by hand")
        child.is_ready, child.is_alone = True, False

    def _limits_of_child(self) -> dict[str, int]:
        """Objects in this process's memory are out of a child's reach: there, results stay inline."""
        limits = asdict(self._engine.limits)
        if self._engine.payloads.url.startswith("memory:"):
            most = TABLE["inline_bytes_max"].most
            limits |= {"inline_bytes_max": most, "chunk_bytes_max": most}
        return limits

    async def _keep(self, child: _ChildProcess) -> None:
        """Read a child's answers; when it dies, say what it had begun, and start another in its place."""
        failures_count = 0
        while True:
            while (message := await _next_message(child.reader)) is not None:
                if isinstance(message, SliceOutcomes):
                    failures_count = 0
                    self._ended(child, message)
            await self._bury(child)
            while not self._is_stopping:
                await self._engine.clock.sleep(BACKOFF_S[min(failures_count, len(BACKOFF_S) - 1)])
                failures_count += 1
                try:
                    await self._launch(child)
                except (HeadraceError, OSError) as error:
                    LOG.error("a child process could not be started", error=str(error))
                else:
                    break
            if self._is_stopping:
                return
            self._dispatch(child)

    async def _bury(self, child: _ChildProcess) -> None:
        assert child.process is not None
        child.is_ready = False
        if child.writer is not None:
            child.writer.close()
        try:  # killing what is dying already would reap it here, and nobody would know how it died
            await asyncio.wait_for(child.process.wait(), KILL_AFTER_S)
        except TimeoutError:
            self._kill(child)  # it closed its end of the wire, and is of no more use
        evidence = _how(await child.process.wait(), child.process.pid)
        has_evidence = child.marks_path.exists()
        begun, deadline_us = read(child.marks_path), read_deadline(child.marks_path)
        is_overdue = bool(deadline_us) and monotonic() * 1_000_000 > deadline_us
        remove([child.marks_path])
        if child.parts:
            LOG.warning("a child process died", evidence=evidence, slices=len(child.parts))
        for slice_id, part in list(child.parts.items()):
            work = part.work
            own = {work.span_slots[number]: number for number in part.numbers if not work.codes[number]}
            suspects = [
                span_slot for span_slot in begun.get((work.lease.span_id, work.lease.token), ()) if span_slot in own
            ]
            if not has_evidence and work.lease.at_most_once:
                suspects = list(own)
            if is_overdue:
                for span_slot in suspects:
                    self._time_out(work, own[span_slot])
                self._account(child, len(suspects))
            elif not self._is_stopping:
                work.suspects += suspects
                work.evidence = evidence
            if not work.is_over:
                self._broken.add(work)
            self._close_part(child, slice_id, suspects)

    def _time_out(self, work: ActiveLease, number: int) -> None:
        """A run that did not hear its timeout: its process was killed, which is no crash of the run's making."""
        spec = self._registry.get(work.lease.task)
        error = TimeoutError(f"timed out after {spec.timeout_s:g} s and had to be killed")
        failure = Failure(type="TimeoutError", message=str(error), attempts=work.lease.attempt)
        now_us = self._engine.clock.now_us()
        due_us = retry_at_us(spec.retry, attempt=work.lease.attempt, error=error, now_us=now_us, random=lambda: 0.5)
        if due_us is None or work.lease.at_most_once:
            work.end(number, run.FAILED, failure.encode())
        else:
            work.end(number, RETRY, failure.encode(), due_us=due_us)

    async def _watch_deadlines(self) -> None:
        while True:
            await self._engine.clock.sleep(1)
            for child in self._children:
                deadline_us = read_deadline(child.marks_path) if child.parts else 0
                if deadline_us and monotonic() * 1_000_000 > deadline_us + KILL_AFTER_S * 1_000_000:
                    self._kill(child)

    @staticmethod
    def _kill(child: _ChildProcess) -> None:
        if child.process is not None and child.process.returncode is None:
            with suppress(ProcessLookupError):  # it was faster
                child.process.kill()


async def _next_message(reader: asyncio.StreamReader) -> SliceOutcomes | ChildReady | ChildFailed | None:
    try:
        (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        message: SliceOutcomes | ChildReady | ChildFailed = from_child.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message


def _how(code: int, pid: int) -> str:
    if code < 0:
        known = signal.Signals.__members__.values()
        name = next((one.name for one in known if one == -code), f"signal {-code}")
        return f"process {pid} was ended by {name}"
    return f"process {pid} ended by itself with exit code {code}"
