"""A URL that leads to another kind of server, or to a wrong path of a Headrace server, is named in the error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace import Client
from headrace.foundation.errors import ClientFault, HeadraceError, InvalidSetting, StoreBroken, StoreUnavailable
from headrace.remote.connection import ServerConnection
from headrace.remote.store import RemoteStore
from tests.support.http_server import KEY, LIMITS, running_server

PAGE = b"<html>Welcome</html>"


@asynccontextmanager
async def website(status: bytes, *headers: bytes) -> AsyncGenerator[str, None]:
    """A server that answers every request with an HTML page. Yields its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line.partition(b":")[2]))
        lines = (b"HTTP/1.1 " + status, b"content-type: text/html", b"content-length: %d" % len(PAGE), *headers)
        writer.write(b"\r\n".join(lines) + b"\r\nconnection: close\r\n\r\n" + PAGE)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("status", [b"404 Not Found", b"405 Method Not Allowed"])
async def test_an_error_of_another_kind_of_server_names_the_url(status: bytes) -> None:
    async with website(status) as url, Client(url, KEY, attempts=1) as client:
        with pytest.raises(HeadraceError) as error:
            await client.send("task", [1])
        assert f"{url}/v1/batches is not an endpoint of a Headrace server" in error.value.message
        assert status[:3].decode() in error.value.message
        assert "http://host:port" in error.value.hint


async def test_a_server_that_redirects_forever_is_unavailable_and_named() -> None:
    async with website(b"302 Found", b"location: /login") as url, Client(url, KEY, attempts=1) as client:
        with pytest.raises(StoreUnavailable, match=f"no response from {url}: .*redirect"):
            await client.batch("batch_00000000000000000000000000")


async def test_a_web_page_instead_of_json_names_the_url() -> None:
    async with website(b"200 OK") as url, Client(url, KEY, attempts=1) as client:
        with pytest.raises(StoreBroken, match=f"expected JSON from the Headrace server at {url}/v1/batches"):
            await client.send("task", [1])
        store = RemoteStore(ServerConnection(url, KEY, attempts=1), LIMITS)
        with pytest.raises(StoreBroken, match=f"{url} is not a Headrace server"):
            await store.open()


async def test_a_wrong_path_of_a_headrace_server_is_distinguished_from_a_missing_batch(tmp_path: Path) -> None:
    async with running_server(tmp_path, "memory") as server:
        store = RemoteStore(ServerConnection(server.server.url + "/api", KEY, attempts=1), LIMITS)
        with pytest.raises(ClientFault, match="/api/v1/about is not an endpoint of a Headrace server"):
            await store.open()
        async with Client(server.server.url, KEY, attempts=1) as client:
            with pytest.raises(HeadraceError) as error:
                await client.batch("batch_00000000000000000000000000")
            assert error.value.code == "NOT_FOUND"


def test_an_invalid_url_is_shown_without_its_password() -> None:
    with pytest.raises(InvalidSetting) as error:
        ServerConnection("ftp://user:secret@host", KEY)
    assert "expected a server URL like https://host" in error.value.message
    assert "'ftp://host'" in error.value.message
    assert "secret" not in error.value.message
