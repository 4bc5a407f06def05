"""The story of a server that is killed in the middle of a stream, and of a worker far away that finishes the work."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.http_server import AUTH, KEY, NDJSON, HttpAnswer, HttpPeer, line

pytestmark = [pytest.mark.journey, pytest.mark.timeout(120)]

TASKS: Final = """
from headrace import Headrace

app = Headrace("far")


@app.task
async def task(item):
    return len(item["text"]) if "text" in item else item["i"]
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Program:
    """One `headrace` command in a directory, and the lines it says."""

    def __init__(self, place: Path, *arguments: str) -> None:
        self._place, self._arguments = place, arguments
        self.process: Any = None

    async def start(self, until: str) -> None:
        """Start it, and wait until it has said something."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headrace",
            *self._arguments,
            cwd=self._place,
            env={**os.environ, "HEADRACE_API_KEY": KEY},
            stderr=asyncio.subprocess.PIPE,
        )
        while not re.search(until, said := (await self.process.stderr.readline()).decode()):
            assert said, f"{self._arguments} ended before it said {until!r}"

    async def end(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        await self.process.stderr.read()
        return int(await self.process.wait())


async def ask(port: int, method: str, path: str, body: Any = None, headers: Any = None) -> HttpAnswer:
    peer = HttpPeer("127.0.0.1", port)
    try:
        return await peer.ask(method, path, body, headers)
    finally:
        await peer.close()


async def created(port: int, count: int) -> str:
    return str((await ask(port, "POST", "/api/v3/batches", json.dumps({"runCount": count}).encode())).json["id"])


async def test_a_server_killed_in_mid_stream_loses_nothing_and_a_worker_elsewhere_completes_all(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    port = free_port()
    serve = ("serve", "--store", "sqlite:///headrace.db", "--port", str(port))
    async with AsyncExitStack() as stack:

        async def program(until: str, *arguments: str) -> Program:
            found = Program(tmp_path, *arguments)
            stack.push_async_callback(found.end, signal.SIGKILL)
            await found.start(until)
            return found

        server = await program("serving", *serve)

        # twenty items of 600 KB each: they seal, and streamed again nothing is accepted
        large = await created(port, 20)
        items = [line(index, {"text": chr(97 + index) * 600_000}) for index in range(20)]
        answer = await ask(port, "POST", f"/api/v3/batches/{large}/items", items, NDJSON)
        assert (answer.json["itemsAccepted"], answer.json["sealed"]) == (20, True)
        again = await ask(port, "POST", f"/api/v3/batches/{large}/items", items, NDJSON)
        assert (again.json["itemsAccepted"], again.json["itemsDeduplicated"], again.json["sealed"]) == (0, 0, True)

        # the next stream is cut by a kill, and goes on by what is missing
        count = 5_000
        small = await created(port, count)
        peer = await HttpPeer("127.0.0.1", port).connect()
        path = f"/api/v3/batches/{small}/items"
        await peer.head("POST", path, {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        for index in range(count // 2):
            await peer.chunk(line(index))
        while not (await ask(port, "GET", f"/v1/batches/{small}/missing")).json["received"]:
            await asyncio.sleep(0)
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
        await peer.close()
        server = await program("serving", *serve)
        missing = (await ask(port, "GET", f"/v1/batches/{small}/missing")).json
        assert 0 < missing["received"] < count
        left = [index for first, last in missing["ranges"] for index in range(first, last + 1)]
        assert len(left) == count - missing["received"]
        answer = await ask(port, "POST", path, [line(index) for index in left], NDJSON)
        assert (answer.json["itemsAccepted"], answer.json["itemsDeduplicated"], answer.json["sealed"]) == (
            len(left),
            0,
            True,
        )

        # a worker in another process, over the network
        worker = await program("working on", "worker", "tasks.py:app", "--server", f"http://127.0.0.1:{port}")
        for batch_id, expected in ((large, [600_000] * 20), (small, list(range(count)))):
            results = await ask(port, "GET", f"/v1/batches/{batch_id}/results")
            assert [json.loads(one)["output"] for one in results.body.splitlines() if one] == expected
            assert (await ask(port, "GET", f"/api/v2/batches/{batch_id}")).json["status"] == "COMPLETED"
        assert await worker.end(signal.SIGTERM) == 0
        assert await server.end(signal.SIGTERM) == 0


async def test_several_servers_share_a_port_and_work_and_stop_together(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    port = free_port()
    arguments = ("serve", "tasks.py:app", "--store", "sqlite:///headrace.db", "--port", str(port), "--workers", "2")
    program = Program(tmp_path, *arguments)
    await program.start("server 2: serving")
    try:
        while True:
            try:
                batch_id = await created(port, 50)
                break
            except OSError:
                await asyncio.sleep(0)
        answer = await ask(port, "POST", f"/api/v3/batches/{batch_id}/items", [line(n) for n in range(50)], NDJSON)
        assert answer.json["sealed"]
        results = await ask(port, "GET", f"/v1/batches/{batch_id}/results")
        assert len(results.body.split()) >= 50
    finally:
        code = await program.end(signal.SIGTERM)
    assert code == 0


async def run(place: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """One command to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "headrace",
        *arguments,
        cwd=place,
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await process.communicate()
    return int(process.returncode or 0), out.decode(), error.decode()


async def test_a_key_is_made_shown_once_used_for_a_map_and_revoked(tmp_path: Path) -> None:
    (tmp_path / "double.py").write_text("def double(item):\n    return 2 * item\n")
    (tmp_path / "in.ndjson").write_text("".join(f"{n}\n" for n in range(200)))
    store = ("--store", "sqlite:///headrace.db")
    code, out, _ = await run(tmp_path, "key", "create", "--scopes", "*", "--name", "ci", "--json", *store)
    made = json.loads(out)
    assert (code, made["key"].startswith("tr_headrace_")) == (0, True)
    code, out, said = await run(tmp_path, "key", "create", "--scopes", "everything", *store)
    assert (code, out, "unknown scope 'everything'" in said) == (2, "", True)
    _, out, _ = await run(tmp_path, "key", "list", "--json", *store)
    assert [(key["id"], key["name"]) for key in json.loads(out)["keys"]] == [(made["id"], "ci")]
    assert made["key"] not in out

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = Program(tmp_path, "serve", *store, "--port", str(port))
    await server.start("serving")
    try:
        arguments = ("map", "double.py:double", "in.ndjson", "-o", "out.ndjson", "--server", url, "--no-progress")
        code, _, said = await run(tmp_path, *arguments, HEADRACE_API_KEY=made["key"])
        assert code == 0, said
        lines = [json.loads(one) for one in (tmp_path / "out.ndjson").read_text().splitlines()]
        assert [one["output"] for one in lines] == [2 * n for n in range(200)]
        code, _, said = await run(tmp_path, *arguments, *store)
        assert (code, "expected --store or --server, got both" in said) == (2, True)
        code, _, said = await run(tmp_path, "batch", "list", "--store", url, HEADRACE_API_KEY="not-a-key-of-it")
        assert (code, "Invalid API Key" in said) == (2, True)
        code, _, said = await run(tmp_path, "key", "revoke", made["id"], *store)
        assert (code, "is revoked" in said) == (0, True)
    finally:
        await server.end(signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--host", "0.0.0.0", "--no-auth"], {}, "would give access without a key to everyone"),
        (["--port", "99999"], {}, "port: expected an integer"),
        (
            ["--store", "https://elsewhere.example"],
            {},
            "expected a database for --store, got https://elsewhere.example",
        ),
        (["--workers", "2", "--port", "0"], {}, "name it with --port"),
        (["--host", "not.an.address.invalid"], {}, "can't listen on"),
        ([], {"HEADRACE_INGEST_CONCURRENCY": "0"}, "HEADRACE_INGEST_CONCURRENCY"),
        ([], {"HEADRACE_INGEST_CONCURRENCY": "-1"}, "HEADRACE_INGEST_CONCURRENCY"),
        ([], {"HEADRACE_INGEST_CONCURRENCY": "1.5"}, "HEADRACE_INGEST_CONCURRENCY"),
        ([], {"HEADRACE_INGEST_CONCURRENCY": "ten"}, "HEADRACE_INGEST_CONCURRENCY"),
        ([], {"HEADRACE_API_KEY": "short"}, "api_key: expected at least"),
    ],
)
async def test_a_server_that_can_not_be_is_refused_at_its_start(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], said: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "headrace",
        "serve",
        *arguments,
        cwd=tmp_path,
        env={**os.environ, **environ},
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await process.communicate()
    assert process.returncode == 2
    assert said in error.decode()
