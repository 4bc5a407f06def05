"""The tasks that scenarios run."""

from __future__ import annotations

import asyncio

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
