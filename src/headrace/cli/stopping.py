"""How a long command ends: a first signal asks for good order, a second for now, and nobody outlives its supervisor."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from headrace.cli.printing import note
from headrace.cli.signals import Signals

STOPPED_NOW: Final = 130


@contextmanager
def stopping(who: str, promise: str, *, lifeline: int = -1) -> Iterator[asyncio.Event]:
    """An event that is set by SIGINT, by SIGTERM, and by the end of whoever holds the other end of `lifeline`.

    `promise` says what happens until the process has ended. A second signal ends it now: what was under way is
    recovered by whoever looks first.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stopped() -> None:
        if stop.is_set():
            note(f"{who}stopped")
            os._exit(STOPPED_NOW)
        note(f"{who}stopping: {promise} (again: stop now)")
        stop.set()

    def orphaned() -> None:
        loop.remove_reader(lifeline)
        if not stop.is_set():
            note(f"{who}its supervisor is gone")
            stopped()

    with Signals(stopped):
        if lifeline >= 0:
            loop.add_reader(lifeline, orphaned)
        yield stop


async def supervised(flags: Sequence[str], *, count: int, noun: str, grace_s: float, where: str) -> int:
    """Keep `count` processes of a command alive until a signal ends them all; answers the exit code.

    Each is told its number, and a descriptor that ends when this process does.
    """
    from headrace.runtime.worker.process_supervisor import Supervisor

    def child(number: int, lifeline: int) -> list[str]:
        return [sys.executable, "-m", "headrace", *flags, "--number", str(number), "--lifeline", str(lifeline)]

    supervisor = Supervisor(child, count=count, grace_s=grace_s, say=note)

    def stopped() -> None:
        note(f"stopping every {noun}" if supervisor.stops_count == 0 else f"stopping every {noun} now")
        supervisor.stop()

    with Signals(stopped):
        note(f"keeping {count} {noun}s on {where}")
        code = await supervisor.run()
    return STOPPED_NOW if supervisor.stops_count > 1 else code
