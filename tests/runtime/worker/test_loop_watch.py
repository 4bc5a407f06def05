"""An async task that blocks the event loop is named in a warning while it blocks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace import Headrace
from headrace.foundation.logs import FIELDS
from headrace.runtime.worker.loop_watch import LoopWatch

WAIT_S = 60


class BlockedLog(logging.Handler):
    """Keeps the lines about blocked loops, and sets an event at each."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self.reported = threading.Event()
        self.released = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, FIELDS, {})
        if str(fields.get("event")).startswith("loop."):
            self.lines.append(fields)
            (self.reported if fields["event"] == "loop.blocked" else self.released).set()


@contextmanager
def blocked_log() -> Iterator[BlockedLog]:
    log = BlockedLog()
    logging.getLogger("headrace").addHandler(log)
    try:
        yield log
    finally:
        logging.getLogger("headrace").removeHandler(log)


@pytest.mark.parametrize("waits_first", [False, True], ids=["at once", "after a turn"])
async def test_a_task_that_blocks_the_loop_is_named_while_it_blocks(waits_first: bool, tmp_path: Path) -> None:
    app = Headrace("blocks", store=f"sqlite:///{tmp_path}/headrace.db")

    @app.task
    async def quick(_n: int) -> None:
        await asyncio.sleep(0)

    with blocked_log() as log:

        @app.task
        async def blocks(_n: int) -> bool:
            if waits_first:
                await asyncio.sleep(0)
            return log.reported.wait(WAIT_S)

        async with app, app.worker():
            await (await quick.map(range(10))).wait(timeout_s=WAIT_S)
            run = await blocks.enqueue(1)
            assert await run.result(timeout_s=WAIT_S), "it was reported while it blocked"
            assert await asyncio.to_thread(log.released.wait, WAIT_S)
    blocked, released = log.lines
    for line in (blocked, released):
        assert (line["run"], line["task"], line["attempt"]) == (run.id, "blocks", 1)
        assert "test_loop_watch.py" in str(line["at"])
        assert str(line["at"]).endswith("in blocks")
    assert blocked["seconds"] >= 1
    assert released["seconds"] >= blocked["seconds"]


async def test_a_loop_that_only_waits_is_not_reported() -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def is_busy() -> bool:
        loop.call_soon_threadsafe(asked.set)
        return True

    with blocked_log() as log:
        watch = LoopWatch(is_busy=is_busy, ids_of=lambda _task: {})
        await asked.wait()
        asked.clear()
        await asked.wait()
        watch.stop()
    assert log.lines == []
