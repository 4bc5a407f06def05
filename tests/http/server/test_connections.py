"""Idle connections: they neither take the descriptors of a server nor the places of other peers."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.foundation.descriptors import descriptor_limit, raise_descriptor_limit
from tests.support.http_server import AUTH, LIMITS, HttpPeer, running_server

IDLE_COUNT = 300
DESCRIPTORS = 256
PROGRAM = """
import asyncio, resource, sys
from pathlib import Path
from tests.support.http_server import LIMITS, running_server

resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))

async def main():
    limits = LIMITS.replaced(peer_connections_percent={percent})
    async with running_server(Path(sys.argv[1]), "sqlite", limits=limits) as server:
        print(server.server.address[1], server.server.connections.connections_max, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(len(server.server.connections), flush=True)

asyncio.run(main())
"""

APP = """
import resource

from headrace import Headrace


class Observed(Headrace):
    async def __aenter__(self):
        print(*resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)
        raise SystemExit(0)


app = Observed("app")
"""


@contextlib.contextmanager
def served_with_few_descriptors(folder: Path, percent: int) -> Iterator[tuple[int, int, subprocess.Popen[str]]]:
    """Run a server that may have `DESCRIPTORS`. Yields its port, its bound and its process."""
    program = PROGRAM.format(descriptors=DESCRIPTORS, percent=percent)
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port, connections_max = map(int, process.stdout.readline().split())
            yield port, connections_max, process
        finally:
            process.kill()


@pytest.mark.parametrize("percent", [50, 100])
async def test_more_idle_connections_than_descriptors_leave_the_server_answering(tmp_path: Path, percent: int) -> None:
    with served_with_few_descriptors(tmp_path, percent) as (port, connections_max, process):
        assert connections_max == DESCRIPTORS // 2
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(IDLE_COUNT)]
        peer = await HttpPeer("127.0.0.1", port).connect()
        for _ in range(3):
            assert (await peer.ask("GET", "/healthz")).status == 200
        bound = connections_max * percent // 100
        closed_count = IDLE_COUNT + 1 - bound
        for reader, _ in idle[:closed_count]:
            assert await reader.read() == b"", "those that are idle longest were closed"
        process_input, process_output = process.stdin, process.stdout
        assert process_input is not None
        assert process_output is not None
        process_input.write("\n")
        process_input.flush()
        assert int(await asyncio.to_thread(process_output.readline)) == bound
        for _, writer in idle:
            writer.close()
        await peer.close()


async def test_a_connection_with_a_request_in_progress_is_never_closed_for_another(tmp_path: Path) -> None:
    limits = LIMITS.replaced(connections_max=3, peer_connections_percent=100)
    async with running_server(tmp_path, "sqlite", limits=limits) as server:
        batch_id = await server.filled(1)
        waiting = await server.peer().connect()
        await waiting.head("GET", f"/v1/batches/{batch_id}/events", AUTH)
        assert (await waiting.head_of_answer()).status == 200
        dripping = await server.peer().connect()
        await dripping.send(b"GET /healthz HTTP/1.1\r\nx-slow: ")
        for _ in range(5):
            with contextlib.suppress(ConnectionError):
                await dripping.send(b"v")
            peer = await server.peer().connect()
            assert (await peer.ask("GET", "/healthz")).status == 200
        assert dripping.reader is not None
        with contextlib.suppress(ConnectionError):
            assert await dripping.reader.read() == b"", "an incomplete head keeps no connection"
        assert sum(connection.idle_since_s is None for connection in server.server.connections) == 1
        assert await waiting.piece(), "a stream of events does"


async def test_a_connection_beyond_the_limit_gets_503_while_all_others_are_busy(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=LIMITS.replaced(connections_max=1)) as server:
        waiting = await server.peer().connect()
        await waiting.head("POST", "/v1/tasks/task/runs", {**AUTH, "content-length": "14"})
        while all(connection.idle_since_s is not None for connection in server.server.connections):
            await asyncio.sleep(0)
        refused = await server.peer().ask("GET", "/healthz")
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        await waiting.send(b'{"payload":{}}')
        assert (await waiting.answer()).status == 201
        assert (await server.ask("GET", "/healthz")).status == 200


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        assert descriptor_limit() == min(soft, 512)
        assert raise_descriptor_limit() == min(hard, 1_048_576)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_server_and_a_worker_start_with_all_descriptors_that_they_may_have(tmp_path: Path, command: str) -> None:
    (tmp_path / "tasks.py").write_text(APP)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    shell = f"ulimit -S -n 300; exec {sys.executable} -m headrace {command} tasks.py:app"
    result = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout.split() == [str(min(hard, 1_048_576)), str(hard)], result.stderr
