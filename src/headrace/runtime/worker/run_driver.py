"""Driving one run inside a runner: steps in the run's context, interruptions, functions in threads.

R16 (each run has its own context): each step of a run happens inside the run's own `contextvars` context, although many
runs share one task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextvars import Context as Variables
from types import coroutine
from typing import Any

from headrace.foundation.ids import run_id
from headrace.foundation.logs import CURRENT_RUN
from headrace.runtime.clock import Clock, Timer
from headrace.runtime.sessions.active_lease import BEGUN, ActiveLease
from headrace.runtime.tasks.context import Context
from headrace.runtime.tasks.run_slot import CURRENT_SLOT
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.slots import RunnerSlot, Slots

TIMEOUT = "timeout"
CANCELLED = "cancelled"
STOPPED = "stopped"


class ThreadRun:
    """The run of a thread, for its log lines; the thread may outlast its runner's interest in it."""

    __slots__ = ("active", "lease_offset")

    def __init__(self, active: ActiveLease, lease_offset: int) -> None:
        self.active = active
        self.lease_offset = lease_offset

    def run_ids(self) -> Mapping[str, object]:
        """Return the ids of the run."""
        return ids_of(self.active, self.lease_offset)


def ids_of(active: ActiveLease, lease_offset: int) -> Mapping[str, object]:
    """Return the ids of a run as log lines have them."""
    lease = active.lease
    return {
        "run": run_id(lease.batch_id, lease.indexes[lease_offset]),
        "batch": lease.batch_id,
        "task": lease.task,
        "attempt": lease.attempt,
    }


def context_of(active: ActiveLease, lease_offset: int, spec: TaskSpec, clock: Clock) -> Context:
    """Return the context of a run that begins now."""
    lease = active.lease
    extra = lease.extras.get(active.span_slots[lease_offset])
    return Context(
        batch_id=lease.batch_id,
        index=lease.indexes[lease_offset],
        attempt=lease.attempt,
        task=lease.task,
        queue=lease.queue,
        deadline_us=None if spec.timeout_s is None else clock.now_us() + int(spec.timeout_s * 1_000_000),
        headers=extra.headers if extra is not None else None,
    )


class RunnerState:
    """One runner coroutine and its current run. `reason`: why that run was interrupted, or empty."""

    __slots__ = ("active", "context", "lease_offset", "reason", "slot", "task", "timer", "variables")

    def __init__(self, variables: Variables, slots: Slots) -> None:
        """`variables`: the context of which each run gets a copy. `slots`: where a slot was taken for this runner."""
        self.slot = RunnerSlot(slots, self)
        self.variables = variables.copy()
        self.variables.run(CURRENT_RUN.set, self)
        self.variables.run(CURRENT_SLOT.set, self.slot)
        self.task: asyncio.Task[None] | None = None
        self.active: ActiveLease | None = None
        self.lease_offset = 0
        self.reason = ""
        self.context: Context | None = None
        self.timer: Timer | None = None

    def run_ids(self) -> Mapping[str, object]:
        """Return the ids of the current run, for its log lines."""
        return {} if self.active is None else ids_of(self.active, self.lease_offset)

    @property
    def is_running(self) -> bool:
        """True while there is a current run."""
        return self.active is not None

    def mark_waiting(self, is_waiting: bool) -> None:
        """Remove the in-flight mark of the current run while it waits, and set it again."""
        active, lease_offset = self.active, self.lease_offset
        if active is None or active.codes[lease_offset]:
            return
        if is_waiting:
            active.mark_not_begun(lease_offset)
        else:
            active.marks[active.span_slots[lease_offset]] = BEGUN

    def interrupt(self, reason: str) -> bool:
        """Interrupt the current run for `reason`: `timeout`, `cancelled` or `stopped`. False if there is none, or it
        was already.
        """
        if self.task is None or self.active is None or self.reason:
            return False
        self.reason = reason
        if self.context is not None:
            self.context.cancel()
        self.task.cancel()
        return True

    def interrupt_again(self) -> None:
        """Interrupt again a run that ignored its interruption."""
        if self.task is not None and self.active is not None:
            self.task.cancel()

    def clear(self) -> None:
        """Forget the current run, which has ended."""
        self.active, self.context, self.reason = None, None, ""
        self.slot.end_run()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    @property
    def has_stale_cancellation(self) -> bool:
        """True if a cancellation of the task is still counted although the run that it was meant for has ended."""
        return self.task is not None and self.task.cancelling() > 0

    def drop_stale_cancellations(self) -> None:
        """Uncount those cancellations: timeouts and task groups of a later run rely on a count of zero."""
        while self.task is not None and self.task.cancelling():
            self.task.uncancel()


@coroutine
def continue_coroutine(
    coro: Coroutine[Any, Any, Any], variables: Variables, waits_for: Any
) -> Generator[Any, Any, Any]:
    """Continue a coroutine that has begun, with each step inside its own context."""
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


def call_shielded(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function; raise as `RuntimeError` what can't pass through a future."""
    try:
        return function(*args, **kwargs)
    except (StopIteration, GeneratorExit) as error:
        raise RuntimeError(f"the task raised {type(error).__name__}") from error


def call_without_loop(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a plain function on the thread of an event loop as if the thread had none: it may block, use blocking calls
    of its app, and run an event loop of its own.
    """
    loop = asyncio.get_running_loop()
    asyncio._set_running_loop(None)  # noqa: SLF001 - what asyncio has for code that runs loops
    try:
        return function(*args, **kwargs)
    finally:
        asyncio._set_running_loop(loop)  # noqa: SLF001 - as above


async def await_thread(future: asyncio.Future[Any]) -> Any:
    """Await a function in a thread; the thread continues if this is cancelled."""
    return await asyncio.shield(future)
