"""A process that used a server ends with the exit code of its own code."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.support.http_server import KEY, running_server

PROCESSES = 16
AT_ONCE = 6

CLIENT = """
import asyncio, sys
from headrace import Client

async def main():
    async with Client(sys.argv[1], sys.argv[2]) as client:
        await client.send("task", [1])

asyncio.run(main())
"""

APP = """
import sys
from headrace import Headrace

app = Headrace("far", store=sys.argv[1], api_key=sys.argv[2])

@app.task
def double(value: int) -> int:
    return value * 2

double.enqueue_sync(1)
"""


@pytest.mark.parametrize("script", [CLIENT, APP], ids=["client", "app"])
async def test_a_process_that_used_a_server_exits_with_code_0(tmp_path: Path, script: str) -> None:
    slots = asyncio.Semaphore(AT_ONCE)

    async def run(url: str) -> tuple[int | None, bytes]:
        async with slots:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", script, url, KEY, env=os.environ, stderr=asyncio.subprocess.PIPE
            )
            _, errors = await process.communicate()
            return process.returncode, errors

    async with running_server(tmp_path, "sqlite") as server:
        ends = await asyncio.gather(*(run(server.server.url) for _ in range(PROCESSES)))
    assert ends == [(0, b"")] * PROCESSES
