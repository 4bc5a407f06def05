"""Stopping long commands: the first signal stops gracefully, the second at once; workers end with their supervisor."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from headrace.cli.invocation.printing import note
from headrace.cli.invocation.signals import Signals

STOPPED_NOW: Final = 130


@contextmanager
def stopping(who: str, promise: str, *, lifeline: int = -1) -> Iterator[asyncio.Event]:
    """Provide an event that is set by SIGINT, SIGTERM, or the end of the process at the other end of `lifeline`.

    `promise` tells the user what happens until the process ends. A second signal ends it at once; its leases are
    recovered by other processes.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stopped() -> None:
        if stop.is_set():
            note(f"{who}stopped")
            os._exit(STOPPED_NOW)
        note(f"{who}stopping: {promise} (repeat the signal to stop now)")
        stop.set()

    def orphaned() -> None:
        loop.remove_reader(lifeline)
        if not stop.is_set():
            note(f"{who}the supervisor has ended")
            stopped()

    with Signals(stopped):
        if lifeline >= 0:
            loop.add_reader(lifeline, orphaned)
        yield stop


async def supervised(flags: Sequence[str], *, count: int, noun: str, grace_s: float, where: str) -> int:
    """Keep `count` processes of a command alive until a signal ends them all; return the exit code.

    Each gets its number, and a file descriptor that closes when this process ends.
    """
    from headrace.runtime.worker.process_supervisor import ProcessSupervisor

    def child(number: int, lifeline: int) -> list[str]:
        return [sys.executable, "-m", "headrace", *flags, "--number", str(number), "--lifeline", str(lifeline)]

    supervisor = ProcessSupervisor(child, count=count, grace_s=grace_s, say=note)

    def stopped() -> None:
        note(f"stopping every {noun}" if supervisor.stops_count == 0 else f"stopping every {noun} now")
        supervisor.stop()

    with Signals(stopped):
        note(f"keeping {count} {noun}s on {where}")
        code = await supervisor.run()
    return STOPPED_NOW if supervisor.stops_count > 1 else code
