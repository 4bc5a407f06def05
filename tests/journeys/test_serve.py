"""A server that is killed during a stream, and a remote worker that completes the work."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.http_server import AUTH, KEY, NDJSON, HttpAnswer, HttpPeer, line
from tests.support.postgres_server import Server, free_port

pytestmark = [pytest.mark.journey, pytest.mark.timeout(120)]

TASKS: Final = """
from headrace import Headrace

app = Headrace("far")


@app.task
async def task(item):
    return len(item["text"]) if "text" in item else item["i"]
"""


class Program:
    """A `headrace` command in a directory, and its output."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._folder, self._arguments = folder, arguments
        self.process: Any = None

    async def start(self, until: str) -> None:
        """Start the command, and wait for an output line that matches `until`."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headrace",
            *self._arguments,
            cwd=self._folder,
            env={**os.environ, "HEADRACE_API_KEY": KEY},
            stderr=asyncio.subprocess.PIPE,
        )
        while not re.search(until, output := (await self.process.stderr.readline()).decode()):
            assert output, f"{self._arguments} ended before it printed {until!r}"

    async def end(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        await self.process.stderr.read()
        return int(await self.process.wait())


@asynccontextmanager
async def programs(folder: Path) -> AsyncIterator[Callable[..., Awaitable[Program]]]:
    """Yield a function `(until, *arguments)` that starts a program. All are killed when the block ends."""
    async with AsyncExitStack() as stack:

        async def program(until: str, *arguments: str) -> Program:
            command = Program(folder, *arguments)
            stack.push_async_callback(command.end, signal.SIGKILL)
            await command.start(until)
            return command

        yield program


async def request(port: int, method: str, path: str, body: Any = None, headers: Any = None) -> HttpAnswer:
    peer = HttpPeer("127.0.0.1", port)
    try:
        return await peer.ask(method, path, body, headers)
    finally:
        await peer.close()


async def create_batch(port: int, count: int) -> str:
    return str((await request(port, "POST", "/api/v3/batches", json.dumps({"runCount": count}).encode())).json["id"])


async def test_a_server_killed_during_a_stream_loses_nothing_and_a_remote_worker_completes_all(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    port = free_port()
    serve = ("serve", "--store", "sqlite:///headrace.db", "--port", str(port))
    async with programs(tmp_path) as program:
        server = await program("serving", *serve)

        # Twenty items of 600 KB each seal the batch; streamed again, no item is accepted.
        large = await create_batch(port, 20)
        items = [line(index, {"text": chr(97 + index) * 600_000}) for index in range(20)]
        answer = await request(port, "POST", f"/api/v3/batches/{large}/items", items, NDJSON)
        assert (answer.json["itemsAccepted"], answer.json["sealed"]) == (20, True)
        repeated = await request(port, "POST", f"/api/v3/batches/{large}/items", items, NDJSON)
        assert (repeated.json["itemsAccepted"], repeated.json["itemsDeduplicated"], repeated.json["sealed"]) == (
            0,
            0,
            True,
        )

        # A kill interrupts the next stream, which then continues with the missing items.
        count = 5_000
        small = await create_batch(port, count)
        peer = await HttpPeer("127.0.0.1", port).connect()
        path = f"/api/v3/batches/{small}/items"
        await peer.head("POST", path, {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        for index in range(count // 2):
            await peer.chunk(line(index))
        while not (await request(port, "GET", f"/v1/batches/{small}/missing")).json["received"]:
            await asyncio.sleep(0)
        assert await server.end(signal.SIGKILL) == -signal.SIGKILL
        await peer.close()
        server = await program("serving", *serve)
        missing = (await request(port, "GET", f"/v1/batches/{small}/missing")).json
        assert 0 < missing["received"] < count
        missing_indexes = [index for first, last in missing["ranges"] for index in range(first, last + 1)]
        assert len(missing_indexes) == count - missing["received"]
        answer = await request(port, "POST", path, [line(index) for index in missing_indexes], NDJSON)
        assert (answer.json["itemsAccepted"], answer.json["itemsDeduplicated"], answer.json["sealed"]) == (
            len(missing_indexes),
            0,
            True,
        )

        # A worker in another process, over the network.
        worker = await program("working on", "worker", "tasks.py:app", "--server", f"http://127.0.0.1:{port}")
        for batch_id, expected in ((large, [600_000] * 20), (small, list(range(count)))):
            results = await request(port, "GET", f"/v1/batches/{batch_id}/results")
            assert [json.loads(text)["output"] for text in results.body.splitlines() if text] == expected
            assert (await request(port, "GET", f"/api/v2/batches/{batch_id}")).json["status"] == "COMPLETED"
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
                batch_id = await create_batch(port, 50)
                break
            except OSError:
                await asyncio.sleep(0)
        answer = await request(port, "POST", f"/api/v3/batches/{batch_id}/items", [line(n) for n in range(50)], NDJSON)
        assert answer.json["sealed"]
        results = await request(port, "GET", f"/v1/batches/{batch_id}/results")
        assert len(results.body.split()) >= 50
    finally:
        code = await program.end(signal.SIGTERM)
    assert code == 0


async def run(folder: Path, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """Run a command to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "headrace",
        *arguments,
        cwd=folder,
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await process.communicate()
    return int(process.returncode or 0), out.decode(), error.decode()


async def test_a_key_is_created_shown_once_used_for_a_map_and_revoked(tmp_path: Path) -> None:
    (tmp_path / "double.py").write_text("def double(item):\n    return 2 * item\n")
    (tmp_path / "in.ndjson").write_text("".join(f"{n}\n" for n in range(200)))
    store = ("--store", "sqlite:///headrace.db")
    code, out, _ = await run(tmp_path, "key", "create", "--scopes", "*", "--name", "ci", "--json", *store)
    key = json.loads(out)
    assert (code, key["key"].startswith("tr_headrace_")) == (0, True)
    code, out, error = await run(tmp_path, "key", "create", "--scopes", "everything", *store)
    assert (code, out, "unknown scope 'everything'" in error) == (2, "", True)
    _, out, _ = await run(tmp_path, "key", "list", "--json", *store)
    assert [(listed["id"], listed["name"]) for listed in json.loads(out)["keys"]] == [(key["id"], "ci")]
    assert key["key"] not in out

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = Program(tmp_path, "serve", *store, "--port", str(port))
    await server.start("serving")
    try:
        arguments = ("map", "double.py:double", "in.ndjson", "-o", "out.ndjson", "--server", url, "--no-progress")
        code, _, error = await run(tmp_path, *arguments, HEADRACE_API_KEY=key["key"])
        assert code == 0, error
        lines = [json.loads(text) for text in (tmp_path / "out.ndjson").read_text().splitlines()]
        assert [outcome["output"] for outcome in lines] == [2 * n for n in range(200)]
        code, _, error = await run(tmp_path, *arguments, *store)
        assert (code, "expected --store or --server, got both" in error) == (2, True)
        code, _, error = await run(tmp_path, "batch", "list", "--store", url, HEADRACE_API_KEY="not-a-key-of-it")
        assert (code, "Invalid API Key" in error) == (2, True)
        code, _, error = await run(tmp_path, "key", "revoke", key["id"], *store)
        assert (code, "is revoked" in error) == (0, True)
    finally:
        await server.end(signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
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
        ([], {"HEADRACE_API_KEY": "short"}, "environment HEADRACE_API_KEY: expected 8 to"),
    ],
)
async def test_a_server_with_invalid_settings_is_refused_at_its_start(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], words: str
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
    _, error_output = await process.communicate()
    assert process.returncode == 2
    assert words in error_output.decode()


async def test_a_server_and_its_remote_worker_continue_when_the_database_is_back(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    port, database = free_port(), Server()
    try:
        async with programs(tmp_path) as program:

            async def outcome(answer: HttpAnswer) -> str:
                """Return the state in which a run ends. Errors of the server before that are ignored."""
                assert answer.status == 201, answer
                while True:
                    view = await request(port, "GET", f"/v1/runs/{answer.json['id']}")
                    if view.status == 200 and view.json["state"] in ("completed", "failed"):
                        return str(view.json["state"])
                    await asyncio.sleep(0)

            await program("serving", "serve", "--store", f"{database.dsn}?schema=away", "--port", str(port))
            await program("working", "worker", "tasks.py:app", "--server", f"http://127.0.0.1:{port}")
            body = json.dumps({"payload": {"i": 1}}).encode()
            enqueue = (port, "POST", "/v1/tasks/task/runs", body, {"content-type": "application/json"})
            assert await outcome(await request(*enqueue)) == "completed"
            await asyncio.to_thread(database.stop)
            enqueueing = asyncio.create_task(request(*enqueue))
            while (await request(port, "GET", "/readyz")).status != 503:
                await asyncio.sleep(0)
            await asyncio.to_thread(database.start)
            assert await outcome(await enqueueing) == "completed"
            assert (await request(port, "GET", "/readyz")).status == 200
    finally:
        database.remove()
