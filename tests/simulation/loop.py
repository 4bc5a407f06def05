"""An event loop that owns time, order and the life of processes; everything it does follows from a seed.

Rule 1: time moves only when nothing can run, and then at once to the next timer. A run of hours takes milliseconds.
Rule 2: what is ready runs in an order that the seed picks. Code that needs another order than it asked for is found.
Rule 3: each callback belongs to the simulated process in whose context it was made, or to none (the network, the
supervisor). What belongs to a frozen process is laid aside until it thaws, to a dead one for ever: no `finally` and
no `except` of it runs, just as after kill -9. Between two awaits of any task the seed may let its process die.
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
STEPS_IN_ONE_MOMENT_MAX: Final = 200_000

RUNNING: Final = "running"
FROZEN: Final = "frozen"
DEAD: Final = "dead"
BURIED: Final = "buried"
"""A dead process after the verdict: its tasks may end, so that nothing of it is left behind in the interpreter."""


class Stuck(Exception):
    """Nothing can ever happen again, or one moment never ends."""


class Process:
    """What the loop knows of a simulated process: whether it runs, and what was laid aside while it did not."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = RUNNING
        self.steps_count = 0
        self.dies_at_step = 0
        self.aside: list[asyncio.Handle] = []

    def die(self, where: str) -> None:
        """End at once, without a word to anybody."""
        del where
        self.state = DEAD

    @property
    def is_alive(self) -> bool:
        """Whether it has not died, frozen or not."""
        return self.state in (RUNNING, FROZEN)


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class SimulatedLoop(asyncio.BaseEventLoop):
    """`shuffle` is how often the seed picks what runs next, from 0 (first come, first served) to 1."""

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
        self._steps_now = 0
        self.set_task_factory(self._task_of)

    def time(self) -> float:
        """Seconds since the simulation began."""
        return self._now_s

    def run_as(self, process: Process, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task of a process; whatever it starts belongs to the process too."""
        context = Context()
        context.run(PROCESS.set, process)
        return self.create_task(coroutine, context=context)

    def put_back(self, process: Process) -> None:
        """What was laid aside while the process did not run can run now."""
        aside, process.aside = process.aside, []
        self._ready.extend(aside)

    def _task_of(
        self,
        _loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        **more: Any,
    ) -> asyncio.Task[T]:
        """Tasks of dead processes are kept, or the garbage collector would run their `finally` blocks."""
        task: asyncio.Task[T] = asyncio.Task(coroutine, loop=self, **more)
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
        """Move due timers to what is ready; when nothing is, go to the next timer first."""
        scheduled = self._scheduled
        while scheduled and scheduled[0].cancelled():
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]  # as the stdlib's loop does
        if self._ready:
            self._steps_now += len(self._ready)
            if self._steps_now > STEPS_IN_ONE_MOMENT_MAX:
                raise Stuck(f"the moment {self._now_s} never ends: {self._ready[0]!r}")
        elif scheduled:
            self._now_s = max(self._now_s, scheduled[0].when())
            self._steps_now = 0
        elif not self._stopping:  # type: ignore[attr-defined]  # of the stdlib's loop
            raise Stuck("nothing can ever happen again")
        while scheduled and scheduled[0].when() <= self._now_s:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False  # type: ignore[attr-defined]  # as the stdlib's loop does
            self._ready.append(timer)

    def _step(self, handle: asyncio.Handle) -> None:
        if handle.cancelled():
            return
        process: Process | None = handle._context.get(PROCESS)  # type: ignore[attr-defined]  # of every handle
        if process is None or process.state == BURIED:
            handle._run()
            return
        if process.state == RUNNING:
            process.steps_count += 1
            if process.steps_count != process.dies_at_step:
                self.steps_count += 1
                handle._run()
                return
            process.die(f"await:{place_of(handle)}")
        process.aside.append(handle)

    def _write_to_self(self) -> None:
        """No other thread ever wakes this loop."""

    def _process_events(self, event_list: list[Any]) -> None:
        """There is no network but the simulated one."""
        del event_list


def place_of(handle: asyncio.Handle) -> str:
    """The await of Headrace's own code at which a task stands: a fault point by name."""
    task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]  # of every handle
    if not isinstance(task, asyncio.Task):
        return "callback"
    at: Any = task.get_coro()
    place = "begin"
    while at is not None:
        frame = getattr(at, "cr_frame", None) or getattr(at, "ag_frame", None) or getattr(at, "gi_frame", None)
        if frame is not None and "headrace" in frame.f_code.co_filename and frame.f_lasti > 0:
            place = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
        at = getattr(at, "cr_await", None) or getattr(at, "ag_await", None) or getattr(at, "gi_yieldfrom", None)
    return place


class SimulatedClock(SystemClock):
    """A process's clock: the loop's time and an offset, since hosts disagree by seconds and sometimes by minutes."""

    def __init__(self, loop: SimulatedLoop, offset_s: float) -> None:
        self._loop = loop
        self._offset_us = int(offset_s * SECOND_US)
        self._floor_us = 0

    def now_us(self) -> int:
        """This moment, as this host sees it; it never goes back, so after a jump back it stands for a while."""
        now_us = START_US + int(self._loop.time() * SECOND_US) + self._offset_us
        self._floor_us = max(self._floor_us, now_us)
        return self._floor_us

    def jump(self, offset_s: float) -> None:
        """Somebody sets the clock of the host."""
        self._offset_us = int(offset_s * SECOND_US)
