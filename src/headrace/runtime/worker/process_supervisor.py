"""Keeps worker processes alive: starts them, restarts those that died, hands signals on, ends them together.

Each child is a whole worker with a session and connections of its own, so the supervisor is on nobody's way. It needs
no store: whichever worker looks first (the one that takes the dead one's place, at the latest) finds by the marks
that the process died and which runs it had begun.
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
"""A child that lived this long starts the backoff from its beginning."""

KILL_AFTER_S: Final = 5.0


class ProcessExit(NamedTuple):
    """How a child ended: its exit code, or minus the signal that killed it."""

    number: int
    pid: int
    code: int

    def __str__(self) -> str:
        return f"died of {signal.Signals(-self.code).name}" if self.code < 0 else f"ended with {self.code}"


class ProcessSupervisor:
    """`command(number, lifeline)` is what child `number` runs; it ends when the pipe `lifeline` does.

    `say` is told what happens. A child whose exit code says that its caller must change something ends them all.
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
        """The children that live."""
        return [process.pid for process in self._processes.values()]

    async def run(self) -> int:
        """Keep the children until `stop`; answers the exit code for all of them."""
        watched, lifeline = os.pipe()
        try:
            keepers = [asyncio.create_task(self._keep(number, watched)) for number in range(1, self._count + 1)]
            await self._stop.wait()
            _, late = await asyncio.wait(keepers, timeout=self._grace_s)
            if late:
                self._say("some workers did not end in time and are killed; what they had begun is recovered")
                self._code = self._code or HeadraceError.exit_code
                self._signal(signal.SIGKILL)
            await asyncio.gather(*keepers)
        finally:
            os.close(lifeline)
            os.close(watched)
        return self._code

    def stop(self) -> None:
        """Ask every child to end in good order; asked again, to end now."""
        self.stops_count += 1
        self._stop.set()
        self._signal(signal.SIGTERM)
        if self.stops_count > 1:
            asyncio.get_running_loop().call_later(KILL_AFTER_S, self._signal, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    async def _keep(self, number: int, watched: int) -> None:
        """One child after the other, until all are to end."""
        failures_count = 0
        while not self._stop.is_set():
            began_s = monotonic()
            ended = await self._child(number, watched)
            if self._stop.is_set():
                self._code = self._code or (max(0, ended.code))
                return
            if ended.code == ClientFault.exit_code:
                self._say(f"worker {number} says that something must be changed first; all are stopped")
                self._code = ended.code
                self.stop()
                return
            failures_count = 0 if monotonic() - began_s > STEADY_S else failures_count + 1
            wait_s = self._backoff_s[min(max(failures_count - 1, 0), len(self._backoff_s) - 1)]
            self._say(f"worker {number} (process {ended.pid}) {ended}; another takes its place in {wait_s:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait_s or 0.001)

    async def _child(self, number: int, watched: int) -> ProcessExit:
        """Start a child and wait for its end. It has a session of its own: signals come from here, not the terminal."""
        process = await asyncio.create_subprocess_exec(
            *self._command(number, watched), pass_fds=(watched,), start_new_session=True
        )
        self._processes[number] = process
        if self._stop.is_set():  # it began as the others were told to end
            process.send_signal(signal.SIGTERM)
        try:
            return ProcessExit(number, process.pid, await process.wait())
        finally:
            del self._processes[number]
