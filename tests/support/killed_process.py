"""Processes that run a scenario and are killed by SIGKILL at a fault point: `python -m tests.support.killed_process`.

The input of a process is `{"url", "environment", "now_us", "place", "log", "completed"}`. Its answer is `ended` if the
scenario did not reach that fault point. What was acknowledged is written to its log, a line each, before it continues.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from tests.support.failing_stores import faulty_scenario, faulty_store
from tests.support.fork_server import serve
from tests.support.store_scenario import Acknowledged


def live(life: dict[str, Any]) -> None:
    """Run the scenario up to the fault point."""
    log = os.open(life["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(acknowledged: Acknowledged) -> None:
        os.write(log, f"{acknowledged.batch_id} {acknowledged.run_index} {acknowledged.state}\n".encode())

    def at(place: str) -> None:
        if place == life["place"]:
            os.kill(os.getpid(), signal.SIGKILL)

    async def run_all() -> None:
        store = faulty_store(life["url"])
        await store.open()
        completed = [(batch_id, index) for batch_id, index in life["completed"]]
        await faulty_scenario(store, life["environment"], life["now_us"], at, note=note, completed=completed).run_all()
        await store.close()

    asyncio.run(run_all())


if __name__ == "__main__":
    serve(live)
