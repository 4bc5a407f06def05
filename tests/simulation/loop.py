"""An event loop that controls time, order and the lifetime of processes, all derived from a seed.

Rule 1: time moves only when no callback is ready, and then at once to the next timer. Hours of virtual time take
milliseconds. Rule 2: ready callbacks run in an order that the seed picks. This reveals code that depends on another
order. Rule 3: each callback belongs to the simulated process in whose context it was created, or to none (the network,
the supervisor). Callbacks of a frozen process are deferred until it thaws; callbacks of a crashed process never run: no
`finally` and no `except` of it runs, just as after kill -9. The seed may crash a process between two awaits of any
task.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Coroutine, Generator
from contextvars import Context, ContextVar
from random import Random
from typing import Any, Final, TypeVar

from headrace.runtime.clock import SECOND_US, SystemClock

T = TypeVar("T")
START_US: Final = 1_700_000_000 * SECOND_US
STEPS_AT_A_TIME_MAX: Final = 200_000

RUNNING: Final = "running"
FROZEN: Final = "frozen"
CRASHED: Final = "dead"
DISCARDED: Final = "buried"
"""A crashed process after the simulation: its tasks may end, so that none of them stays in the interpreter."""


class Stuck(Exception):
    """No callback can ever run again, or the time never moves on."""


class Process:
    """State of a simulated process, and the callbacks that were deferred while it did not run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = RUNNING
        self.steps_count = 0
        self.crashes_at_step = 0
        self.deferred: list[asyncio.Handle] = []

    def crash(self, where: str) -> None:
        """End at once, without notifying other processes."""
        del where
        self.state = CRASHED

    @property
    def is_alive(self) -> bool:
        """Return True if the process has not crashed; it may be frozen."""
        return self.state in (RUNNING, FROZEN)


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class SimulatedLoop(asyncio.BaseEventLoop):
    """Deterministic loop. `shuffle` is the probability that the seed picks the next callback, from 0 (first come, first
    served) to 1.
    """

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self, random: Random, *, shuffle: float) -> None:
        super().__init__()
        self.broken: BaseException | None = None
        self.pending: dict[asyncio.Task[Any], None] = {}
        self.steps_count = 0
        self._random = random
        self._shuffle = shuffle
        self._now_s = 0.0
        self._steps_at_this_time = 0
        self.set_task_factory(self._task_of)

    def time(self) -> float:
        """Return the seconds since the simulation began."""
        return self._now_s

    def run_as(self, process: Process, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task of a process; all tasks that it starts belong to the process too."""
        context = Context()
        context.run(PROCESS.set, process)
        return self.create_task(coroutine, context=context)

    def resume(self, process: Process) -> None:
        """Make the deferred callbacks of a process ready."""
        deferred, process.deferred = process.deferred, []
        self._ready.extend(deferred)

    def _task_of(
        self,
        _loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        **options: Any,
    ) -> asyncio.Task[T]:
        """Keep the tasks of crashed processes: the garbage collector would run their `finally` blocks."""
        task: asyncio.Task[T] = asyncio.Task(coroutine, loop=self, **options)
        self.pending[task] = None
        task.add_done_callback(lambda done: self.pending.pop(done, None), context=Context())
        return task

    def _run_once(self) -> None:
        self._wake_due()
        ready = self._ready
        for _ in range(len(ready)):
            if self._shuffle and len(ready) > 1 and self._random.random() < self._shuffle:
                ready.rotate(-self._random.randrange(len(ready)))
            self._step(ready.popleft())
            if self.broken is not None:
                broken, self.broken = self.broken, None
                raise broken

    def _wake_due(self) -> None:
        """Make due timers ready; if no callback is ready, move the time to the next timer first."""
        scheduled = self._scheduled
        while scheduled and scheduled[0].cancelled():
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]  # as the stdlib's loop does
        if self._ready:
            self._steps_at_this_time += len(self._ready)
            if self._steps_at_this_time > STEPS_AT_A_TIME_MAX:
                raise Stuck(f"the time {self._now_s} never moves on: {self._ready[0]!r}")
        elif scheduled:
            self._now_s = max(self._now_s, scheduled[0].when())
            self._steps_at_this_time = 0
        elif not self._stopping:  # type: ignore[attr-defined]  # of the stdlib's loop
            raise Stuck("no callback is ready and no timer is set")
        while scheduled and scheduled[0].when() <= self._now_s:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False  # type: ignore[attr-defined]  # as the stdlib's loop does
            self._ready.append(timer)

    def _step(self, handle: asyncio.Handle) -> None:
        if handle.cancelled():
            return
        process: Process | None = handle._context.get(PROCESS)  # type: ignore[attr-defined]  # of every handle
        if process is None or process.state == DISCARDED:
            handle._run()
            return
        if process.state == RUNNING:
            process.steps_count += 1
            if process.steps_count != process.crashes_at_step:
                self.steps_count += 1
                handle._run()
                return
            process.crash(f"await:{await_point_of(handle)}")
        process.deferred.append(handle)

    def _write_to_self(self) -> None:
        """Do nothing: no other thread wakes this loop."""

    def _process_events(self, event_list: list[Any]) -> None:
        """Do nothing: the only network is the simulated network."""
        del event_list


def await_point_of(handle: asyncio.Handle) -> str:
    """Return the await in Headrace's code at which a task is suspended, as the name of a fault point."""
    task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]  # of every handle
    if not isinstance(task, asyncio.Task):
        return "callback"
    awaited: Any = task.get_coro()
    point = "begin"
    while awaited is not None:
        frame = (
            getattr(awaited, "cr_frame", None)
            or getattr(awaited, "ag_frame", None)
            or getattr(awaited, "gi_frame", None)
        )
        if frame is not None and "headrace" in frame.f_code.co_filename and frame.f_lasti > 0:
            point = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
        awaited = (
            getattr(awaited, "cr_await", None)
            or getattr(awaited, "ag_await", None)
            or getattr(awaited, "gi_yieldfrom", None)
        )
    return point


class SimulatedClock(SystemClock):
    """Clock of a process: the time of the loop plus an offset, since the clocks of hosts differ by seconds and
    sometimes by minutes.
    """

    def __init__(self, loop: SimulatedLoop, offset_s: float) -> None:
        self._loop = loop
        self._offset_us = int(offset_s * SECOND_US)
        self._latest_us = 0

    def now_us(self) -> int:
        """Return the time of this host. It never goes back: after a jump back it stays the same until it has caught
        up.
        """
        now_us = START_US + int(self._loop.time() * SECOND_US) + self._offset_us
        self._latest_us = max(self._latest_us, now_us)
        return self._latest_us

    def jump(self, offset_s: float) -> None:
        """Set the offset of the host's clock."""
        self._offset_us = int(offset_s * SECOND_US)
