"""Processes that tell a story and are killed by SIGKILL at a place of it: `python -m tests.store.doomed`.

Each line of the input is a life, as JSON: `{"url", "environment", "now_us", "place", "log", "completed"}`. A life is
a fork of this process, which has everything loaded and nothing open; the answer is `killed`, or `told` when the story
never came to that place, or `failed`. What a life was told goes to its log, a line each, before it goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from typing import Any

from tests.store.harm import harmed_store, harmed_story
from tests.store.story import Told


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


def main() -> None:
    """One life after the other."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                live(json.loads(line))
            except BaseException:  # noqa: BLE001 - a fork must end here, whatever happened
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print({0: "told", -signal.SIGKILL: "killed"}.get(code, "failed"), flush=True)


if __name__ == "__main__":
    main()
