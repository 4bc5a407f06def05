"""Batches over HTTP on loopback: rate of ingest, memory of the server, and rate of streamed results.

`python -m bench.http_ingest SCENARIO…`: each scenario has a server in another process with uvloop, and a client that is
only a socket. Baselines are measured in the same run: an empty batch for the cost of a request, a server that reads and
parses but stores nothing, and the delay of the object store alone.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

KEY: Final = "tr_bench_key_of_the_environment"
MIB: Final = 1024 * 1024
ROUNDS: Final = 5


def serve(wire: Any, kind: str, limits: dict[str, int], delay_s: float, stores: bool) -> None:
    """Run a server process. Each write to the object store takes `delay_s`; without `stores`, items are parsed and
    dropped.
    """
    import uvloop
    from tests.support.store_rig import FACTORIES

    from headrace.foundation import interpreter
    from headrace.foundation.limits import DEFAULT
    from headrace.http.requests.service import Service
    from headrace.http.server.server import serving
    from headrace.runtime.clock import SystemClock
    from headrace.runtime.engine import Engine
    from headrace.runtime.wakeup import Wakeup
    from headrace.store.object_store import open_payloads
    from headrace.store.payloads import PayloadStore
    from headrace.store.protocol import Appended

    interpreter.tune()

    class DelayedPayloads(PayloadStore):
        async def put(self, key: str, data: bytes) -> None:
            if delay_s:
                await asyncio.sleep(delay_s)
            else:
                await super().put(key, data)

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            bounds = DEFAULT.replaced(**limits)
            store = FACTORIES[kind](Path(folder), bounds)
            await store.open()
            inner = open_payloads(f"{folder}/objects")
            if not stores:

                async def drop(_batch_id: str, chunks: Any, **_: Any) -> Appended:
                    return Appended(accepted_count=sum(chunk.runs_count for chunk in chunks), duplicates_count=0)

                baseline: Any = store
                baseline.append = drop
            engine = Engine(
                store=store,
                payloads=DelayedPayloads(inner.objects, url=inner.url, concurrency=1_000),
                clock=SystemClock(),
                limits=bounds,
                environment="default",
                live_directory=None,
                beats_beside=False,
                wakeup=Wakeup(),
            )
            async with serving(Service(engine, api_key=KEY), "127.0.0.1", 0) as server:
                wire.send((*server.address, os.getpid()))
                while await asyncio.to_thread(wire.recv) != "stop":
                    wire.send(await complete(engine))
            await store.close()

    uvloop.run(run())


async def complete(engine: Any) -> int:
    """Settle every waiting run with a small result, directly at the store."""
    from tests.support.store_rig import settlement_of

    from headrace.foundation.ids import new_session_id
    from headrace.store.protocol import Claim, Session

    store, now_us = engine.store, engine.clock.now_us()
    session = new_session_id(now_us)
    await store.start_session(Session(id=session, kind="w", host="h", pid=1, started_us=now_us), now_us=now_us)
    count = number = 0
    while True:
        number += 1
        claim = Claim(
            session_id=session, claim_no=number, environment="default", tasks=["task"], queues=None, runs_max=8_192
        )
        leases = await store.claim(claim, now_us=now_us)
        if not leases:
            return count
        await store.settle([settlement_of(lease) for lease in leases], now_us=now_us)
        count += sum(len(lease.span_slots) for lease in leases)


class Client:
    """A connection to the measured server, with access to its memory figures."""

    def __init__(self, host: str, port: int, pid: int, wire: Any) -> None:
        self.host, self.port, self.pid, self.wire = host, port, pid, wire
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb", buffering=1 << 20)

    def request(
        self, method: str, path: str, pieces: Iterable[bytes] | bytes = b"", *, kind: str = "application/json"
    ) -> Any:
        """Send a request and return the JSON of its response."""
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: {kind}\r\n"
        if isinstance(pieces, bytes):
            self.socket.sendall(f"{head}content-length: {len(pieces)}\r\n\r\n".encode() + pieces)
        else:
            self.socket.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
            for piece in pieces:
                self.socket.sendall(b"%x\r\n" % len(piece) + piece + b"\r\n")
            self.socket.sendall(b"0\r\n\r\n")
        return json.loads(b"".join(self.response()))

    def response(self) -> Iterator[bytes]:
        """Yield the body of the response in pieces."""
        status = int(self.file.readline().split()[1])
        headers = {}
        while (line := self.file.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        if headers.get("transfer-encoding") == "chunked":
            while (size := int(self.file.readline(), 16)) > 0:
                yield self.file.read(size)
                self.file.readline()
            self.file.readline()
        else:
            yield self.file.read(int(headers.get("content-length", "0")))
        assert status < 300, status

    def batch(self, count: int) -> str:
        """Create a batch."""
        return str(self.request("POST", "/api/v3/batches", json.dumps({"runCount": count}).encode())["id"])

    def stream(self, batch_id: str, pieces: Iterable[bytes]) -> Any:
        """Stream items into a batch."""
        return self.request("POST", f"/api/v3/batches/{batch_id}/items", pieces, kind="application/x-ndjson")

    def cpu(self) -> float:
        """Return the processor seconds that the server has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> int:
        """Return the resident memory of the server."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096


@contextmanager
def server(kind: str = "sqlite", *, delay_s: float = 0.0, stores: bool = True, **limits: int) -> Iterator[Client]:
    """Start a server in another process, and yield a client of it."""
    pipe, server_pipe = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=serve, args=(server_pipe, kind, {"batch_runs_max": 10**8, **limits}, delay_s, stores)
    )
    process.start()
    host, port, pid = pipe.recv()
    client = Client(host, port, pid, pipe)
    try:
        yield client
    finally:
        client.socket.close()
        pipe.send("stop")
        process.join(60)


@contextmanager
def sampled_memory(client: Client) -> Iterator[list[int]]:
    """Sample the server's memory every 20 ms for the duration of the block."""
    samples = [client.rss()]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.02):
            samples.append(client.rss())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def items(count: int, payload: bytes, per_piece: int = 1) -> Iterator[bytes]:
    """Yield the lines of `count` items, `per_piece` to a chunk."""
    lines: list[bytes] = []
    for index in range(count):
        lines.append(b'{"index":%d,"task":"task","payload":%s}\n' % (index, payload))
        if len(lines) == per_piece:
            yield b"".join(lines)
            lines = []
    if lines:
        yield b"".join(lines)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took, and its result."""
    began = time.perf_counter()
    response = work()
    return time.perf_counter() - began, response


def waves(concurrency: int, delay_s: float) -> float:
    """Return the baseline of an ingest with that delay: the bare waits of its waves, on the same kind of loop."""
    import uvloop

    async def run() -> None:
        for _ in range(150 // concurrency):
            await asyncio.gather(*(asyncio.sleep(delay_s) for _ in range(concurrency)))

    return timed(lambda: uvloop.run(run()))[0]


def trigger_dev() -> None:
    """Print trigger.dev's table: 150 items, 10 ms of offload each or none, at concurrency 1, 10 and 50."""
    large = b'"' + b"x" * 1_024 + b'"'
    print("| offload | concurrency | wall ms | waits alone ms | empty batch ms | wall / (waits + empty) |")
    print("|---|--:|--:|--:|--:|--:|")
    for delay_s, inline in ((0.010, 512), (0.0, 512 * 1024)):
        for concurrency in (1, 10, 50):
            walls, empties, waits = [], [], [0.0]
            with server(delay_s=delay_s, ingest_concurrency=concurrency, inline_bytes_max=inline) as client:
                for _ in range(ROUNDS + 1):
                    empties.append(timed(partial(client.stream, client.batch(1), [b"\n"]))[0] * 1_000)
                    if delay_s:
                        waits.append(waves(concurrency, delay_s) * 1_000)
                    wall, response = timed(partial(client.stream, client.batch(150), list(items(150, large))))
                    assert (response["itemsAccepted"], response["sealed"]) == (150, True), response
                    walls.append(wall * 1_000)
            wall_ms, empty_ms, waits_ms = (statistics.median(values[1:] or [0.0]) for values in (walls, empties, waits))
            ratio = f"{wall_ms / (waits_ms + empty_ms):.2f}" if delay_s else "-"
            row = (
                f"{delay_s * 1_000:.0f} ms",
                concurrency,
                f"{wall_ms:.1f}",
                f"{waits_ms:.1f}",
                f"{empty_ms:.1f}",
                ratio,
            )
            print(f"| {' | '.join(map(str, row))} |")


def small(kind: str = "postgres", count: int = 1_000_000) -> None:
    """Measure a stream of small items, beside the same body read and parsed and not stored."""
    payload = b'{"n":12345,"text":"an item of about a hundred bytes, as they come"}'
    rates: dict[bool, list[float]] = {True: [], False: []}
    for stores in (False, True, False, True, False, True):
        with server(kind, stores=stores) as client:
            client.stream(client.batch(2_000), items(2_000, payload, 100))
            batch_id = client.batch(count)
            body = list(items(count, payload, 400))
            with sampled_memory(client) as samples:
                wall, response = timed(partial(client.stream, batch_id, body))
            assert response["itemsAccepted"] == count, response
            rates[stores].append(count / wall)
            peak = max(samples) / MIB
    stored, parsed = (statistics.median(rates[is_stored]) for is_stored in (True, False))
    ratio = f"ratio {stored / parsed:.2f}, RSS {peak:.0f} MiB"
    print(f"{kind}: {stored:,.0f} items/s stored, {parsed:,.0f} parsed only, {ratio}")


def medium() -> None:
    """Measure items of 4 KiB: megabytes a second parsed only, and stored."""
    payload = b'"' + b"y" * 4_000 + b'"'
    count = 100_000
    for stores in (False, True):
        with server("sqlite", stores=stores) as client:
            batch_id = client.batch(count)
            body = list(items(count, payload, 16))
            size, before = sum(map(len, body)) / 1e6, client.cpu()
            wall, response = timed(partial(client.stream, batch_id, body))
            assert response["itemsAccepted"] == count
            cpu_s = client.cpu() - before
            what = "stored" if stores else "parsed only"
            rates = f"{size / wall:,.0f} MB/s, {size / cpu_s:,.0f} MB a second of the server's processor"
            print(f"4 KiB items, {what}: {rates}")


def large() -> None:
    """Measure 20 MB of items of 1 MB, offloaded ten at a time to a directory."""
    with server("sqlite") as client:
        walls = []
        for _ in range(ROUNDS):
            batch_id = client.batch(20)
            body = list(items(20, b'"' + b"z" * 1_000_000 + b'"'))
            walls.append(timed(partial(client.stream, batch_id, body))[0])
        print(f"20 items of 1 MB: {statistics.median(walls) * 1_000:.0f} ms")


def memory() -> None:
    """Measure peak memory above idle, with items of 3 MiB and writes that take a second, at concurrency 1, 10 and
    50.
    """
    size = 3 * MIB - 200
    print("| concurrency | peak above idle MiB | bound MiB |")
    print("|--:|--:|--:|")
    for concurrency in (1, 10, 50):
        with server("sqlite", delay_s=1.0, ingest_concurrency=concurrency) as client:
            client.stream(client.batch(1), items(1, b"1"))
            idle = client.rss()
            payload = b'"' + b"m" * size + b'"'
            count = max(6, 3 * concurrency)
            with sampled_memory(client) as samples:
                response = client.stream(client.batch(count), items(count, payload))
            assert response["sealed"], response
            bound = 1.5 * concurrency * 3 + 8 + 32
            print(f"| {concurrency} | {(max(samples) - idle) / MIB:.0f} | {bound:.0f} |")


def slow() -> None:
    """Measure a slow object store and a fast client: the client is slowed down, and the server's memory stays flat."""
    with server("sqlite", delay_s=0.1, ingest_concurrency=10) as client:
        payload = b'"' + b"s" * MIB + b'"'
        client.stream(client.batch(1), items(1, b"1"))
        with sampled_memory(client) as samples:
            wall, _ = timed(lambda: client.stream(client.batch(400), items(400, payload)))
        curve = [f"{samples[len(samples) * part // 10] / MIB:.0f}" for part in range(10)]
        print(f"400 MB in {wall:.1f} s (limit 4.0 s), RSS MiB in tenths: {' '.join(curve)}")


def huge(gigabytes: int = 10) -> None:
    """Measure the server's memory during a body of 10 GB, of items of 64 KiB that are parsed and not stored."""
    payload = b'"' + b"h" * 65_000 + b'"'
    count = gigabytes * 1_000_000_000 // 65_040
    with server("sqlite", stores=False) as client:
        with sampled_memory(client) as samples:
            wall, response = timed(lambda: client.stream(client.batch(count), items(count, payload)))
        assert response["itemsAccepted"] == count
        curve = [f"{samples[len(samples) * part // 10] / MIB:.0f}" for part in range(10)]
        print(f"{gigabytes} GB in {wall:.0f} s, RSS MiB in tenths: {' '.join(curve)}, peak {max(samples) / MIB:.0f}")


def results(count: int = 1_000_000) -> None:
    """Measure the streamed results of a million runs."""
    for kind in ("sqlite", "postgres"):
        with server(kind) as client:
            batch_id = client.batch(count)
            client.stream(batch_id, items(count, b'{"n":1}', 400))
            client.wire.send(batch_id)
            assert client.wire.recv() == count
            walls = []
            head = f"GET /v1/batches/{batch_id}/results HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n\r\n"
            for _ in range(3):
                client.socket.sendall(head.encode())
                wall, lines = timed(lambda: sum(piece.count(b"\n") for piece in client.response()))
                assert lines == count
                walls.append(wall)
            print(f"{kind}: {count / statistics.median(walls):,.0f} lines/s of results")


SCENARIOS: Final = {
    scenario.__name__: scenario for scenario in (trigger_dev, small, medium, large, memory, slow, huge, results)
}

if __name__ == "__main__":
    for name in sys.argv[1:] or SCENARIOS:
        print(f"\n## {name}", flush=True)
        SCENARIOS[name]()
