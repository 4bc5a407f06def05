"""The tasks that scenarios run."""

from __future__ import annotations

import asyncio
import os
import time

from headrace.app import Headrace

app = Headrace("benchmarks")

NAP_S = 0.1


@app.task
async def nothing(_item: object) -> None:
    """Do nothing: the scenario measures everything around the run."""


@app.task
async def nap(_item: object) -> None:
    """Wait 100 ms."""
    await asyncio.sleep(NAP_S)


@app.task
async def stamp(asked_ns: int) -> int:
    """Return the nanoseconds since the enqueue, on the clock that all processes of a machine share."""
    return time.monotonic_ns() - asked_ns


@app.task
async def held(item: int) -> None:
    """Log the start of the run and the process, then wait to be killed with it."""
    with open(os.environ["HELD_LOG"], "a", encoding="ascii") as log:  # noqa: ASYNC230 - a line, and then it only waits
        log.write(f"{item} {os.getpid()}\n")
    await asyncio.Event().wait()
