"""The process supervisor: it starts worker processes, restarts those that end, forwards signals, and ends them
together.

Each child is a whole worker with a session and connections of its own, so the supervisor takes no part in the work and
needs no store. The worker that checks first, at the latest the replacement, finds by the in-flight marks that the
process ended and which runs it had begun.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final, NamedTuple

from headrace.foundation.errors import ClientFault, HeadraceError

BACKOFF_S: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
STEADY_S: Final = 30.0
"""A child that lived this long starts again at the shortest back-off."""

KILL_AFTER_S: Final = 5.0


class ProcessExit(NamedTuple):
    """The end of a child: its exit code, or minus the signal that killed it."""

    number: int
    pid: int
    code: int

    def __str__(self) -> str:
        return f"was killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exited with code {self.code}"


class ProcessSupervisor:
    """Keeps `count` processes running.

    `command(number, lifeline)` returns the command of child `number`, which ends when the pipe `lifeline` is closed.
    `say` gets a line about each event. A child whose exit code means that a person must change something first ends all
    of them.
    """

    def __init__(
        self,
        command: Callable[[int, int], Sequence[str]],
        *,
        count: int,
        grace_s: float,
        say: Callable[[str], None],
        backoff_s: Sequence[float] = BACKOFF_S,
    ) -> None:
        self._command = command
        self._count = count
        self._grace_s = grace_s
        self._say = say
        self._backoff_s = backoff_s
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._stop = asyncio.Event()
        self.stops_count = 0
        self._code = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the running children."""
        return [process.pid for process in self._processes.values()]

    async def run(self) -> int:
        """Run the children until `stop`; return the exit code for all of them."""
        watched, lifeline = os.pipe()
        try:
            keepers = [asyncio.create_task(self._supervise(number, watched)) for number in range(1, self._count + 1)]
            await self._stop.wait()
            _, unfinished = await asyncio.wait(keepers, timeout=self._grace_s)
            if unfinished:
                self._say("killing the workers that did not stop within the grace period; their runs will be recovered")
                self._code = self._code or HeadraceError.exit_code
                self._signal(signal.SIGKILL)
            await asyncio.gather(*keepers)
        finally:
            os.close(lifeline)
            os.close(watched)
        return self._code

    def stop(self) -> None:
        """Ask every child to stop gracefully; if asked again, to end now."""
        self.stops_count += 1
        self._stop.set()
        self._signal(signal.SIGTERM)
        if self.stops_count > 1:
            asyncio.get_running_loop().call_later(KILL_AFTER_S, self._signal, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def _supervise(self, number: int, watched: int) -> None:
        """Run one child after another, until all are to end."""
        failures_count = 0
        while not self._stop.is_set():
            began_s = monotonic()
            exit_ = await self._run_child(number, watched)
            if self._stop.is_set():
                self._code = self._code or (max(0, exit_.code))
                return
            if exit_.code == ClientFault.exit_code:
                self._say(
                    f"worker {number} can't run with these settings (exit code {exit_.code}); stopping all workers"
                )
                self._code = exit_.code
                self.stop()
                return
            failures_count = 0 if monotonic() - began_s > STEADY_S else failures_count + 1
            wait_s = self._backoff_s[min(max(failures_count - 1, 0), len(self._backoff_s) - 1)]
            self._say(f"worker {number} (process {exit_.pid}) {exit_}; starting another in {wait_s:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait_s or 0.001)

    async def _run_child(self, number: int, watched: int) -> ProcessExit:
        """Start a child and wait for its end. It has a session of its own: signals come from the supervisor, not the
        terminal.
        """
        process = await asyncio.create_subprocess_exec(
            *self._command(number, watched), pass_fds=(watched,), start_new_session=True
        )
        self._processes[number] = process
        if self._stop.is_set():  # it started while the others were being stopped
            process.send_signal(signal.SIGTERM)
        try:
            return ProcessExit(number, process.pid, await process.wait())
        finally:
            del self._processes[number]
