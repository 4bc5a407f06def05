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
    """A run that costs nothing: what is measured is everything around it."""


@app.task
async def nap(_item: object) -> None:
    """A run that waits 100 ms."""
    await asyncio.sleep(NAP_S)


@app.task
async def stamp(asked_ns: int) -> int:
    """Nanoseconds since it was asked for, on the clock that all processes of a machine share."""
    return time.monotonic_ns() - asked_ns


@app.task
async def held(item: int) -> None:
    """A run that writes down that it began, and where, and then waits to be killed with its process."""
    with open(os.environ["HELD_LOG"], "a", encoding="ascii") as log:  # noqa: ASYNC230 - a line, and then it only waits
        log.write(f"{item} {os.getpid()}\n")
    await asyncio.Event().wait()
