"""Processes that run until they are killed: a server that forks, and the client that requests forks.

Each line of the server's input is a life: the arguments of one fork, as JSON. A fork has all modules loaded and nothing
open. The answer is `killed` if SIGKILL ended it, `ended` if it reached its end, or `failed`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any


def serve(live: Callable[[dict[str, Any]], None]) -> None:
    """Run one life after the other, until the input ends."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                live(json.loads(line))
            except BaseException:  # noqa: BLE001 - a fork must end here after any error
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print({0: "ended", -signal.SIGKILL: "killed"}.get(code, "failed"), flush=True)


class Forks:
    """Client of a server of forks."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def live(self, **life: Any) -> str:
        """Run one life; return how it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(life).encode() + b"\n")
        return (await self._process.stdout.readline()).decode().strip()


@asynccontextmanager
async def forks_of(module: str) -> AsyncIterator[Forks]:
    """Start the server of forks for a module of tests."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", module),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield Forks(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
