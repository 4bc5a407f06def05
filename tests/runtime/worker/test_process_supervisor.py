"""Process supervisor, tested with real processes that do almost nothing."""

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
report = lambda *words: os.write(out, (" ".join(map(str, words)) + chr(10)).encode())  # a signal may come in the middle
signal.signal(signal.SIGTERM, lambda *_: (report("stopped", sys.argv[1]), os._exit(0)))
report("began", sys.argv[1], os.getpid())
{body}
"""
WAITS = "signal.pause()"


class SupervisorRig:
    """A supervisor over scripts, and the lines that they write."""

    def __init__(self, folder: Path, body: str, *, count: int, grace_s: float = 30.0) -> None:
        self.path = folder / "lines"
        os.mkfifo(self.path)
        self.messages: list[str] = []
        self._body = body
        self.supervisor = ProcessSupervisor(
            self._command, count=count, grace_s=grace_s, say=self.messages.append, backoff_s=(0.0,)
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
            await asyncio.sleep(0)  # the transport closes its pipe at the next turn of the loop

    async def read_line(self) -> list[str]:
        return (await self._reader.readline()).decode().split()


@asynccontextmanager
async def running_rig(
    folder: Path, body: str, *, count: int, **options: float
) -> AsyncIterator[tuple[SupervisorRig, asyncio.Task[int]]]:
    rig = SupervisorRig(folder, body, count=count, **options)
    await rig.open()
    running = asyncio.create_task(rig.supervisor.run())
    try:
        yield rig, running
    finally:
        for pid in rig.supervisor.pids:
            os.kill(pid, signal.SIGKILL)
        rig.supervisor.stop()
        await asyncio.gather(running, return_exceptions=True)
        await rig.close()


def pids_of(lines: list[list[str]]) -> dict[str, int]:
    return {number: int(pid) for _, number, pid in lines}


async def test_a_killed_child_is_replaced_and_the_other_children_stay(tmp_path: Path) -> None:
    async with running_rig(tmp_path, WAITS, count=3) as (rig, running):
        pids = pids_of([await rig.read_line() for _ in range(3)])
        assert sorted(pids) == ["1", "2", "3"]
        os.kill(pids["2"], signal.SIGKILL)
        began, number, pid = await rig.read_line()
        assert (began, number) == ("began", "2")
        assert int(pid) not in pids.values()
        assert set(rig.supervisor.pids) == {pids["1"], pids["3"], int(pid)}
        assert "was killed by SIGKILL" in rig.messages[0]
        rig.supervisor.stop()
        assert sorted([await rig.read_line() for _ in range(3)]) == [["stopped", n] for n in "123"]
        assert await running == 0


async def test_a_child_that_exits_for_invalid_settings_stops_all_children(tmp_path: Path) -> None:
    async with running_rig(tmp_path, "sys.exit(2) if sys.argv[1] == '1' else signal.pause()", count=2) as (
        rig,
        running,
    ):
        assert await running == 2
        assert "can't run with these settings" in rig.messages[-1]


async def test_a_child_that_ignores_its_stop_signal_is_killed_after_the_grace(tmp_path: Path) -> None:
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN); report('ignoring', 1, 1); signal.pause()"
    async with running_rig(tmp_path, ignoring, count=1, grace_s=0.05) as (rig, running):
        while (await rig.read_line())[0] != "ignoring":
            pass
        rig.supervisor.stop()
        assert await running == 1
        assert "killing the workers" in rig.messages[-1]


async def test_a_stop_while_a_child_is_being_replaced_starts_none(tmp_path: Path) -> None:
    async with running_rig(tmp_path, "os.kill(os.getpid(), 9)", count=1) as (rig, running):
        await rig.read_line()
        while not rig.messages:
            await asyncio.sleep(0)
        rig.supervisor.stop()
        assert await running == 0
        assert rig.supervisor.pids == []


async def test_children_detect_the_end_of_their_supervisor(tmp_path: Path) -> None:
    watch = "import select; select.select([{lifeline}], [], []); report('orphaned', 1, 1)"
    program = (
        "import asyncio, sys; from headrace.runtime.worker.process_supervisor import ProcessSupervisor\n"
        f"child = {CHILD!r}.replace('{{body}}', {watch!r})\n"
        "command = lambda n, fd: [sys.executable, '-c', child.replace('{lifeline}', str(fd)), str(n), sys.argv[1]]\n"
        "asyncio.run(ProcessSupervisor(command, count=1, grace_s=9, say=print).run())\n"
    )
    rig = SupervisorRig(tmp_path, WAITS, count=1)
    await rig.open()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(rig.path))
    assert (await rig.read_line())[0] == "began"
    process.kill()
    await process.wait()
    assert (await rig.read_line())[0] == "orphaned"
    await rig.close()
