"""A child process of a worker: it executes slices of leases and has no store.

Started as `python -m headrace.runtime.worker.process_child FD`. The process ends with its parent: it exits when the
socket is closed, even while runs execute.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from headrace.foundation import interpreter, logs
from headrace.foundation.errors import HeadraceError, InvalidSetting
from headrace.foundation.limits import Limits
from headrace.foundation.settings import load
from headrace.runtime.clock import SystemClock
from headrace.runtime.engine import Offload
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.sessions.inflight_marks import InflightMarks
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.executor import Executor, ExecutorCallbacks
from headrace.runtime.worker.parent_objects import ParentObjects
from headrace.runtime.worker.process_ipc import (
    HEADER,
    ChildFailed,
    ChildReady,
    ChildSetup,
    FromChild,
    InterruptRuns,
    LeaseSlice,
    ObjectAnswer,
    SliceOutcomes,
    StopChild,
    ToChild,
    framed,
    to_child,
)
from headrace.store.object_store import open_payloads
from headrace.store.protocol import Lease

DIRTY_S = 0.02
PR_SET_PDEATHSIG = 1


def load_task(name: str, module_name: str, file: str, attribute: str) -> tuple[TaskSpec, Any]:
    """Import a task in this process; return it and its app, if it has one. Raises `InvalidSetting` if it can't be found
    by its name.
    """
    if "<locals>" in attribute or "<lambda>" in attribute:
        raise InvalidSetting(
            f"task {name} is defined inside a function, where a child process can't import it",
            hint="define the task at the top level of a module",
        )
    module = None
    if module_name not in ("__main__", "__mp_main__"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name.partition(".")[0] and error.name != module_name:
                raise
    if module is None:
        module = _from_file(name, file)
    target: Any = module
    for part in attribute.split("."):
        target = getattr(target, part)
    # the attribute may be the bare function, with its task under another name
    for candidate in (target, *vars(module).values()):
        spec = getattr(candidate, "spec", None)
        if isinstance(spec, TaskSpec) and spec.name == name:
            return spec, getattr(candidate, "app", None)
    if isinstance(getattr(target, "spec", None), TaskSpec):
        target = target.spec.function
    return TaskSpec(name, target), None


def _from_file(name: str, file: str) -> Any:
    loaded = "headrace_tasks_" + Path(file).stem
    if loaded in sys.modules:
        return sys.modules[loaded]
    spec = importlib.util.spec_from_file_location(loaded, file)
    if spec is None or spec.loader is None:
        raise InvalidSetting(f"task {name} can't be found in {file or 'a module without a file'}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[loaded] = module
    spec.loader.exec_module(module)
    return module


class _ChildExecutor:
    """Executes the slices of one child and reports their outcomes."""

    def __init__(self, begin: ChildSetup, wire: socket.socket) -> None:
        self._wire = wire
        self._lock = threading.Lock()
        self._limits = Limits(**begin.limits)
        registry = Registry()
        settings = load(begin.settings, os.environ, Path.cwd())
        for task in begin.tasks:
            spec, app = load_task(*task)
            if spec.options != begin.options[spec.name]:
                raise InvalidSetting(
                    f"task {spec.name} has other options in the child process than in its parent",
                    hint="decorate the task with @app.task where it is defined",
                )
            registry.add(spec)
            if app is not None:
                with suppress(InvalidSetting):  # its module opened it when it was imported
                    app.use(settings)
        self._marks = InflightMarks(Path(begin.marks_path), slot_runs=self._limits.chunk_runs_max)
        self._slices: dict[int, int] = {}
        self._leases: dict[int, ActiveLease] = {}
        self._reported: dict[int, bytearray] = {}
        self._dirty: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._finished = asyncio.Event()
        clock = SystemClock()
        self.objects = ParentObjects(self.send)
        self.executor = Executor(
            registry,
            concurrency=begin.concurrency,
            clock=clock,
            offload=self.objects
            if begin.payloads_url is None
            else Offload(open_payloads(begin.payloads_url), begin.environment),
            limits=self._limits,
            hooks=ExecutorCallbacks(over=self._work_over, dirty=self._work_dirty),
            inline_sync=begin.inline_sync,
            deadline=self._marks.set_deadline if begin.inline_sync else None,
        )

    def send(self, message: FromChild) -> None:
        with self._lock:
            self._wire.sendall(framed(message))

    def take(self, slice_: LeaseSlice) -> None:
        slot, marks = self._marks.take(slice_.span_id, slice_.token, slice_.runs_count)
        lease = Lease(
            span_id=slice_.span_id,
            token=slice_.token,
            batch_id=slice_.batch_id,
            task=slice_.task,
            queue=slice_.queue,
            attempt=slice_.attempt,
            crashes_count=slice_.crashes_count,
            at_most_once=slice_.at_most_once,
            due_us=0,
            expires_us=slice_.expires_us,
            whole=False,
            span_slots=slice_.span_slots,
            indexes=slice_.indexes,
            payloads=slice_.payloads,
            kinds=slice_.kinds,
            extras=slice_.extras,
            runs_count=slice_.runs_count,
        )
        active = ActiveLease(lease, marks, slot)
        self._slices[id(active)] = slice_.id
        self._leases[slice_.id] = active
        self._reported[slice_.id] = bytearray(active.count)
        self.executor.submit(active)

    def interrupt(self, message: InterruptRuns) -> None:
        active = self._leases.get(message.id)
        numbers = set(message.numbers)
        self.executor.interrupt(lambda running, number: running is active and number in numbers, "cancelled")

    async def stop(self, grace_s: float) -> None:
        await self.executor.stop(grace_s=grace_s)
        for slice_id in list(self._leases):
            self._report(slice_id, over=True)
        self._marks.close()
        self._finished.set()

    async def wait(self) -> None:
        await self._finished.wait()

    def _work_over(self, active: ActiveLease) -> None:
        slice_id = self._slices.pop(id(active))
        self._dirty.discard(slice_id)
        self._report(slice_id, over=True)
        self._marks.free(active.slot)

    def _work_dirty(self, active: ActiveLease) -> None:
        active.dirty_since_us = 1
        if not self._dirty:
            self._loop.call_later(DIRTY_S, self._report_dirty)
        self._dirty.add(self._slices[id(active)])

    def _report_dirty(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for slice_id in dirty:
            self._report(slice_id, over=False)

    def _report(self, slice_id: int, *, over: bool) -> None:
        active, reported = self._leases[slice_id], self._reported[slice_id]
        runs = []
        for number, (code, is_reported) in enumerate(zip(active.codes, reported, strict=True)):
            if code and not is_reported:
                reported[number] = 1
                runs.append(active.outcome(number))
        active.dirty_since_us = 0
        if over:
            del self._leases[slice_id], self._reported[slice_id]
        if runs or over:
            self.send(SliceOutcomes(slice_id, runs, over))


def main() -> None:
    """Run until the socket is closed or the parent sends StopChild."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _timed_out)
    wire = socket.socket(fileno=int(sys.argv[1]))
    interpreter.tune()
    _die_with_parent()
    asyncio.run(_serve(wire))
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)  # a stopped child must exit, even if threads never end


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends: a run may hold the interpreter and prevent any
    check.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _timed_out(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError("timed out")


async def _serve(wire: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    begin = _receive(wire)
    if not isinstance(begin, ChildSetup):
        return
    sys.path[:] = begin.paths
    if begin.configures_logs:
        logs.configure(is_json=begin.settings.get("log_format") == "json", level=str(begin.settings["log_level"]))
    try:
        child = _ChildExecutor(begin, wire)
    except Exception as error:  # noqa: BLE001 - a module that can't be imported may raise anything
        reason = str(error) if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
        wire.sendall(framed(ChildFailed(reason)))
        return
    child.send(ChildReady())
    threading.Thread(target=_listen, args=(wire, loop, child), daemon=True).start()
    await child.wait()


def _listen(wire: socket.socket, loop: asyncio.AbstractEventLoop, child: _ChildExecutor) -> None:
    """Read messages from the parent, in a thread of its own, so that a blocked event loop does not hide the parent's
    end.
    """
    while True:
        message = _receive(wire)
        if message is None:
            os._exit(1)  # the parent has ended; no process will settle these outcomes
        match message:
            case LeaseSlice():
                loop.call_soon_threadsafe(child.take, message)
            case ObjectAnswer():
                loop.call_soon_threadsafe(child.objects.resolve, message)
            case InterruptRuns():
                loop.call_soon_threadsafe(child.interrupt, message)
            case StopChild():
                asyncio.run_coroutine_threadsafe(child.stop(message.grace_s), loop)


def _receive(wire: socket.socket) -> ToChild | None:
    head = _receive_exactly(wire, HEADER.size)
    if head is None:
        return None
    body = _receive_exactly(wire, HEADER.unpack(head)[0])
    return None if body is None else to_child.decode(body)


def _receive_exactly(wire: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        try:
            piece = wire.recv(min(count - len(data), 1 << 20))
        except OSError:
            return None
        if not piece:
            return None
        data += piece
    return bytes(data)


if __name__ == "__main__":
    main()
