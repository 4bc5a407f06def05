"""Processes that tell a story and are killed by SIGKILL at a place of it: `python -m tests.support.killed_process`.

A life is `{"url", "environment", "now_us", "place", "log", "completed"}`; its answer is `told` when the story never
came to that place. What a life was told goes to its log, a line each, before it goes on.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from tests.support.failing_stores import harmed_store, harmed_story
from tests.support.fork_server import serve
from tests.support.store_scenario import Told


def live(life: dict[str, Any]) -> None:
    """Tell the story, up to the place."""
    log = os.open(life["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(told: Told) -> None:
        os.write(log, f"{told.batch_id} {told.run_index} {told.state}\n".encode())

    def at(place: str) -> None:
        if place == life["place"]:
            os.kill(os.getpid(), signal.SIGKILL)

    async def tell() -> None:
        store = harmed_store(life["url"])
        await store.open()
        completed = [(batch_id, index) for batch_id, index in life["completed"]]
        await harmed_story(store, life["environment"], life["now_us"], at, note=note, completed=completed).tell()
        await store.close()

    asyncio.run(tell())


if __name__ == "__main__":
    serve(live)
