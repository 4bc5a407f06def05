"""Slots of the runs that compute, and the runs that wait without one.

`concurrency` counts runs that compute. A run that waits for other runs (`batch.wait()`, `run.result()`) gives its slot
to the next run, and stays in memory: at most `waiting_parents_max` of them in a process. Its in-flight mark is removed
for as long, so that it is not suspected when a run of its children ends the process. A slot that becomes free goes to
a run that has waited before a new run begins.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from headrace.foundation.logs import get_logger

LOG: Any = get_logger("headrace.executor")
THREADS_MAX: Final = 1_000
"""Waiting runs of plain functions: each of them keeps a thread."""


class SlottedRun(Protocol):
    """The current run of a runner."""

    @property
    def is_running(self) -> bool:
        """True while the runner has a run."""
        ...

    def mark_waiting(self, is_waiting: bool) -> None:
        """Remove the in-flight mark of the run, or set it again."""
        ...


class Slots:
    """The slots of one executor. `resuming`: runs whose wait has ended and that have no slot yet.

    `on_free`: called when a run has given its slot back and no other run took it.
    """

    def __init__(self, count: int, *, waiting_max: int, on_free: Callable[[], None]) -> None:
        self.waiting_max = waiting_max
        self.waiting_count = 0
        self.waiting_threads_count = 0
        self.resuming: deque[asyncio.Future[None]] = deque()
        self._free_count = count
        self._on_free = on_free
        self._is_limit_logged = False

    def take(self) -> bool:
        """Take a free slot; False if there is none."""
        if self._free_count <= 0:
            return False
        self._free_count -= 1
        return True

    def give(self) -> None:
        """Give a slot to a run that has waited, or free it."""
        while self.resuming:
            future = self.resuming.popleft()
            if not future.done():
                future.set_result(None)
                return
        self._free_count += 1

    def begin_wait(self, *, is_thread: bool) -> bool:
        """Count a run that begins to wait, and give its slot; False at the limit, where it keeps its slot."""
        if self.waiting_count >= self.waiting_max or (is_thread and self.waiting_threads_count >= THREADS_MAX):
            if not self._is_limit_logged:
                self._is_limit_logged = True
                LOG.warning(
                    "wait.slot_kept",
                    waiting=self.waiting_count,
                    hint="raise waiting_parents_max, or let fewer runs wait for their children",
                )
            return False
        self.waiting_count += 1
        self.waiting_threads_count += is_thread
        self.give()
        if self._free_count > 0:
            self._on_free()
        return True

    def end_wait(self, *, is_thread: bool) -> None:
        """Count a run that waits no more."""
        self.waiting_count -= 1
        self.waiting_threads_count -= is_thread

    async def resume(self) -> None:
        """Take a slot for a run that has waited, as soon as one is free."""
        if self.take():
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.resuming.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give()
            raise

    def exceed(self) -> None:
        """Take a slot, also if none is free: the next run that ends gives it back."""
        self._free_count -= 1


class RunnerSlot:
    """The slot of one runner, and the waits of its current run. `is_held`: the runner may execute runs."""

    __slots__ = (
        "_is_resuming",
        "_is_thread",
        "_is_waiting",
        "_loop",
        "_run",
        "_run_no",
        "_slots",
        "_waits_count",
        "is_held",
    )

    def __init__(self, slots: Slots, run: SlottedRun) -> None:
        self._slots = slots
        self._run = run
        self._run_no = 0
        self._waits_count = 0
        self._is_waiting = self._is_resuming = self._is_thread = False
        self._loop = asyncio.get_running_loop()
        self.is_held = True

    def give(self) -> None:
        """Give the slot away, if the runner has it."""
        if self.is_held:
            self.is_held = False
            self._slots.give()

    def end_run(self) -> None:
        """Forget the waits of a run that has ended: some may be left open."""
        self._run_no += 1
        self._waits_count = 0
        if self._is_waiting:
            self._slots.end_wait(is_thread=self._is_thread)
            self._is_waiting = self._is_resuming = False

    def of_thread(self) -> ThreadSlot:
        """Return the slot of the current run, which a thread executes."""
        return ThreadSlot(self, self._run_no)

    def give_back(self) -> int | None:
        """Give the slot back for a wait. Return the number of the run, or None if the run keeps its slot: at the limit,
        or when it waits on another event loop.
        """
        return self.begin_wait(self._run_no, is_thread=False)

    def begin_wait(self, run_no: int, *, is_thread: bool) -> int | None:
        """Begin a wait of the run with that number."""
        if not self._run.is_running or self._run_no != run_no or asyncio.get_running_loop() is not self._loop:
            return None
        if not self._is_waiting:
            if not self._slots.begin_wait(is_thread=is_thread):
                return None
            self._is_waiting, self._is_thread, self.is_held = True, is_thread, False
            self._run.mark_waiting(True)
        self._waits_count += 1
        return run_no

    async def take_again(self, run_no: int) -> None:
        """End a wait. After the last one, wait until a slot is free and take it."""
        if not self._is_last(run_no):
            return
        self._is_resuming = True
        try:
            await self._slots.resume()
        except BaseException:
            if self._run_no == run_no:
                self._is_resuming = False
                self._slots.exceed()
                self._end_wait()
            raise
        if self._run_no != run_no:  # the run has ended meanwhile
            self._slots.give()
            return
        self._is_resuming = False
        if self._waits_count:  # another wait has begun meanwhile
            self._slots.give()
        else:
            self._end_wait()

    def take_at_once(self, run_no: int) -> None:
        """End a wait whose run is being interrupted, without waiting for a slot."""
        if self._is_last(run_no):
            self._slots.exceed()
            self._end_wait()

    def _is_last(self, run_no: int) -> bool:
        if self._run_no != run_no:
            return False
        self._waits_count -= 1
        return not self._waits_count and not self._is_resuming

    def _end_wait(self) -> None:
        self._slots.end_wait(is_thread=self._is_thread)
        self.is_held, self._is_waiting = True, False
        self._run.mark_waiting(False)


class ThreadSlot:
    """The slot of a run that a thread executes; the thread may outlast it."""

    __slots__ = ("_run_no", "_slot")

    def __init__(self, slot: RunnerSlot, run_no: int) -> None:
        self._slot = slot
        self._run_no = run_no

    def give_back(self) -> int | None:
        """Give the slot back for a wait, as `RunnerSlot` does."""
        return self._slot.begin_wait(self._run_no, is_thread=True)

    async def take_again(self, run_no: int) -> None:
        """End a wait. After the last one, wait until a slot is free and take it."""
        await self._slot.take_again(run_no)

    def take_at_once(self, run_no: int) -> None:
        """End a wait whose run is being interrupted, without waiting for a slot."""
        self._slot.take_at_once(run_no)
