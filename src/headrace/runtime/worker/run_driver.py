"""How one run is driven inside a runner: steps in its own context, interruptions, functions in threads.

Rule R16: each step of a run happens inside the run's own `contextvars` context, though many runs share one task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context as Variables
from types import coroutine
from typing import Any

from headrace.runtime.clock import Timer
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.tasks.context import Context

TIMEOUT = "timeout"
CANCELLED = "cancelled"
STOPPED = "stopped"


class RunnerState:
    """One runner coroutine and what it is busy with. `reason`: why the run under way was interrupted, or empty."""

    __slots__ = ("context", "number", "reason", "task", "timer", "work")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.work: ActiveLease | None = None
        self.number = 0
        self.reason = ""
        self.context: Context | None = None
        self.timer: Timer | None = None

    def interrupt(self, reason: str) -> bool:
        """Make the run that is under way end: `timeout`, `cancelled` or `stopped`; False when none is, or was told."""
        if self.task is None or self.work is None or self.reason:
            return False
        self.reason = reason
        if self.context is not None:
            self.context.cancel()
        self.task.cancel()
        return True

    def insist(self) -> None:
        """Interrupt again a run that swallowed its interruption."""
        if self.task is not None and self.work is not None:
            self.task.cancel()

    def rest(self) -> None:
        """The run is over, whatever became of it."""
        self.work, self.context, self.reason = None, None, ""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    @property
    def is_disturbed(self) -> bool:
        """A cancellation of the task is still counted, though the run it was meant for is over."""
        return self.task is not None and self.task.cancelling() > 0

    def calm(self) -> None:
        """Forget those cancellations: what a later run does with timeouts and groups hangs on a count of zero."""
        while self.task is not None and self.task.cancelling():
            self.task.uncancel()


@coroutine
def driven(coro: Coroutine[Any, Any, Any], variables: Variables, waits_for: Any) -> Generator[Any, Any, Any]:
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


def shielded(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What can't pass through a future, or would close whoever awaits it, can as an error of the task."""
    try:
        return function(*args, **kwargs)
    except (StopIteration, GeneratorExit) as error:
        raise RuntimeError(f"the task raised {type(error).__name__}") from error


async def outcome_of(future: asyncio.Future[Any]) -> Any:
    """The outcome of a function in a thread, which goes on there when nobody waits any more."""
    return await asyncio.shield(future)
