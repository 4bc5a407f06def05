"""Processes that live until they are killed: a server of forks on one side, who asks for them on the other.

Each line of the server's input is a life, as JSON. A life is a fork of it, which has everything loaded and nothing
open; the answer is `killed` when it ended by SIGKILL, `told` when it came to its end, or `failed`.
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
    """One life after the other, until the input ends."""
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


class Forks:
    """Asks a server for lives, one after the other."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def live(self, **life: Any) -> str:
        """One more life; answers how it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(life).encode() + b"\n")
        return (await self._process.stdout.readline()).decode().strip()


@asynccontextmanager
async def forks_of(module: str) -> AsyncIterator[Forks]:
    """The server of a module of the tests."""
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
