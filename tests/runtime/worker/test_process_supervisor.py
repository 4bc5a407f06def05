"""Worker processes that are kept alive, with real processes that do next to nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.runtime.worker.process_supervisor import ProcessSupervisor

CHILD = """
import os, signal, sys
out = os.open(sys.argv[2], os.O_WRONLY)
tell = lambda *words: os.write(out, (" ".join(map(str, words)) + chr(10)).encode())  # a signal may come in the middle
signal.signal(signal.SIGTERM, lambda *_: (tell("stopped", sys.argv[1]), os._exit(0)))
tell("began", sys.argv[1], os.getpid())
{body}
"""
WAITS = "signal.pause()"


class Stage:
    """A supervisor over scripts, and what they say, line by line."""

    def __init__(self, folder: Path, body: str, *, count: int, grace_s: float = 30.0) -> None:
        self.path = folder / "said"
        os.mkfifo(self.path)
        self.told: list[str] = []
        self._body = body
        self.supervisor = ProcessSupervisor(
            self._command, count=count, grace_s=grace_s, say=self.told.append, backoff_s=(0.0,)
        )
        self._reading = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self._keep_open = os.open(self.path, os.O_WRONLY)
        self._reader = asyncio.StreamReader()
        self._transport: asyncio.ReadTransport | None = None

    def _command(self, number: int, lifeline: int) -> list[str]:
        body = self._body.format(lifeline=lifeline)
        return [sys.executable, "-c", CHILD.format(body=body), str(number), str(self.path)]

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(self._reading)
        self._transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self._reader), pipe)

    async def close(self) -> None:
        os.close(self._keep_open)
        if self._transport is not None:
            self._transport.close()
            await asyncio.sleep(0)  # it closes its pipe at the loop's next turn

    async def said(self) -> list[str]:
        return (await self._reader.readline()).decode().split()


@asynccontextmanager
async def staged(
    folder: Path, body: str, *, count: int, **more: float
) -> AsyncIterator[tuple[Stage, asyncio.Task[int]]]:
    stage = Stage(folder, body, count=count, **more)
    await stage.open()
    running = asyncio.create_task(stage.supervisor.run())
    try:
        yield stage, running
    finally:
        for pid in stage.supervisor.pids:
            os.kill(pid, signal.SIGKILL)
        stage.supervisor.stop()
        await asyncio.gather(running, return_exceptions=True)
        await stage.close()


def pids_of(lines: list[list[str]]) -> dict[str, int]:
    return {number: int(pid) for _, number, pid in lines}


async def test_a_child_that_dies_is_replaced_and_the_others_are_left_alone(tmp_path: Path) -> None:
    async with staged(tmp_path, WAITS, count=3) as (stage, running):
        pids = pids_of([await stage.said() for _ in range(3)])
        assert sorted(pids) == ["1", "2", "3"]
        os.kill(pids["2"], signal.SIGKILL)
        began, number, pid = await stage.said()
        assert (began, number) == ("began", "2")
        assert int(pid) not in pids.values()
        assert set(stage.supervisor.pids) == {pids["1"], pids["3"], int(pid)}
        assert "was killed by SIGKILL" in stage.told[0]
        stage.supervisor.stop()
        assert sorted([await stage.said() for _ in range(3)]) == [["stopped", n] for n in "123"]
        assert await running == 0


async def test_a_child_that_says_that_something_must_be_changed_ends_them_all(tmp_path: Path) -> None:
    async with staged(tmp_path, "sys.exit(2) if sys.argv[1] == '1' else signal.pause()", count=2) as (stage, running):
        assert await running == 2
        assert "can't run with these settings" in stage.told[-1]


async def test_a_child_that_does_not_hear_is_killed_after_the_grace(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); tell('deaf', 1, 1); signal.pause()"
    async with staged(tmp_path, deaf, count=1, grace_s=0.05) as (stage, running):
        while (await stage.said())[0] != "deaf":
            pass
        stage.supervisor.stop()
        assert await running == 1
        assert "killing the workers" in stage.told[-1]


async def test_a_stop_while_a_child_is_being_replaced_starts_none(tmp_path: Path) -> None:
    async with staged(tmp_path, "os.kill(os.getpid(), 9)", count=1) as (stage, running):
        await stage.said()
        while not stage.told:
            await asyncio.sleep(0)
        stage.supervisor.stop()
        assert await running == 0
        assert stage.supervisor.pids == []


async def test_children_see_that_their_supervisor_is_gone(tmp_path: Path) -> None:
    watch = "import select; select.select([{lifeline}], [], []); tell('orphaned', 1, 1)"
    program = (
        "import asyncio, sys; from headrace.runtime.worker.process_supervisor import ProcessSupervisor\n"
        f"child = {CHILD!r}.replace('{{body}}', {watch!r})\n"
        "command = lambda n, fd: [sys.executable, '-c', child.replace('{lifeline}', str(fd)), str(n), sys.argv[1]]\n"
        "asyncio.run(ProcessSupervisor(command, count=1, grace_s=9, say=print).run())\n"
    )
    stage = Stage(tmp_path, WAITS, count=1)
    await stage.open()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(stage.path))
    assert (await stage.said())[0] == "began"
    process.kill()
    await process.wait()
    assert (await stage.said())[0] == "orphaned"
    await stage.close()
