"""A server process that pushes activations to a worker built with grpcio from the contract."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import re
import signal
import ssl
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import grpc.aio
import pytest

import grpc
from headrace.grpc.messages import taskbroker_pb2 as wire
from tests.support.broker import COMPLETE, activation, stream
from tests.support.grpc_server import AUTHORITY, certificate
from tests.support.grpcio_client import credentials

pytestmark = [pytest.mark.journey, pytest.mark.timeout(120)]

SECRET: Final = "a secret of many bytes"
PACKAGE: Final = "sentry_protos.taskbroker.v1"
COUNT: Final = 300
REPORTS_MAX: Final = 8


def signature(path: str, message: bytes) -> str:
    """Return the signature that the contract defines."""
    return hmac.new(SECRET.encode(), path.encode() + b":" + message, hashlib.sha256).hexdigest()


class Worker:
    """A worker of the contract: accepts signed pushes, is busy when its queue is full, reports in batches."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str] = asyncio.Queue(2 * REPORTS_MAX)
        self.done: Counter[str] = Counter()
        self.invalid_signatures_count = 0

    async def push(self, message: bytes, context: Any) -> bytes:
        """Handle PushTask."""
        path = f"/{PACKAGE}.WorkerService/PushTask"
        sent_signature = dict(context.invocation_metadata()).get("sentry-signature", "")
        if not hmac.compare_digest(sent_signature, signature(path, message)):
            self.invalid_signatures_count += 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "invalid signature")
        try:
            self.queue.put_nowait(wire.PushTaskRequest.FromString(message).task.id)
        except asyncio.QueueFull:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "worker busy")
        return b""

    async def work(self, port: int, over: asyncio.Event) -> None:
        """Execute the tasks of the queue, and report them."""
        path = f"/{PACKAGE}.ConsumerService/SetBatchActivationStatus"
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials()) as channel:
            report = channel.unary_unary(path)
            while True:
                names = [await self.queue.get()]
                while len(names) < REPORTS_MAX and not self.queue.empty():
                    names.append(self.queue.get_nowait())
                self.done.update(names)
                updates = [wire.SetTaskStatusRequest(id=name, status=COMPLETE) for name in names]
                body = wire.SetBatchActivationStatusRequest(updates=updates).SerializeToString()
                await report(body, metadata=(("sentry-signature", signature(path, body)),), timeout=30)
                if len(self.done) == COUNT:
                    over.set()


async def post(port: int, body: bytes) -> Any:
    """Send activations over HTTPS on the same port."""
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    lines = ("POST /v1/activations HTTP/1.1", "host: localhost", "connection: close", f"content-length: {len(body)}")
    head = "\r\n".join((*lines, "content-type: application/x-protobuf", "", ""))
    writer.write(head.encode() + body)
    response = await reader.read()
    writer.close()
    return json.loads(response.partition(b"\r\n\r\n")[2])


async def test_a_server_pushes_over_tls_and_stops_when_its_worker_has_all_tasks(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(certificate().private_key_pem.bytes())
    (tmp_path / "cert.pem").write_bytes(b"".join(piece.bytes() for piece in certificate().cert_chain_pems))
    worker, over = Worker(), asyncio.Event()
    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(worker.push)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(f"{PACKAGE}.WorkerService", {"PushTask": method}),)
    )
    worker_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    environ = {
        "HEADRACE_PUSH": f"app=http://127.0.0.1:{worker_port}",
        "HEADRACE_GRPC_SECRETS": f"{SECRET}, an older secret",
    }
    flags = ("--delivery", "push", "--no-auth", "--port", "0", "--tls-cert", "cert.pem", "--tls-key", "key.pem")
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace", "serve", *flags),
        cwd=tmp_path,
        env={**os.environ, **environ, "HEADRACE_STORE": "sqlite:///headrace.db"},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert program.stderr is not None
        while (match := re.search(rb"on https://127\.0\.0\.1:(\d+)", line := await program.stderr.readline())) is None:
            assert line, "the server ended before it served"
        port = int(match[1])
        working = asyncio.create_task(worker.work(port, over))
        taken = await post(port, stream(*(activation(number) for number in range(COUNT))))
        assert taken["accepted"] == COUNT
        await over.wait()
        program.send_signal(signal.SIGTERM)
        text = (await program.stderr.read()).decode()
        assert await program.wait() == 0, text
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    finally:
        if program.returncode is None:
            program.kill()
        await server.stop(0)
    assert worker.done == Counter(f"id_{number}" for number in range(COUNT))
    assert worker.invalid_signatures_count == 0
    assert SECRET not in text
