"""TCP options of connections: both ends notice a peer that is gone."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from headrace.foundation.limits import DEFAULT
from headrace.foundation.tcp_keepalive import KEEPALIVE_IDLE_S, UNACKNOWLEDGED_MS, keep_alive
from headrace.http.server.server import listener
from headrace.store.postgres import PostgresStore
from tests.support.http_server import running_server
from tests.support.store_rig import fresh_schema


def options_of(connection: socket.socket) -> tuple[int, int, int]:
    """Return whether probes are sent, after how many seconds, and the time for an acknowledgement."""
    tcp = socket.IPPROTO_TCP
    return (
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        connection.getsockopt(tcp, socket.TCP_KEEPIDLE),
        connection.getsockopt(tcp, socket.TCP_USER_TIMEOUT),
    )


async def test_connections_to_postgres_have_keepalive_and_a_user_timeout(tmp_path: Path) -> None:
    store = PostgresStore(fresh_schema(tmp_path), DEFAULT)
    await store.open()
    try:
        async with (await store._pool()).borrowed() as connection:
            raw = connection.raw._transport.get_extra_info("socket")
            assert options_of(raw) == (1, KEEPALIVE_IDLE_S, UNACKNOWLEDGED_MS)
    finally:
        await store.close()


async def test_connections_accepted_by_a_server_have_keepalive_and_a_user_timeout(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        peer = await server.peer().connect()
        assert (await peer.ask("GET", "/healthz")).status == 200
        (accepted,) = server.server.connections
        raw = accepted.transport.get_extra_info("socket")  # type: ignore[attr-defined]  # of this protocol
        idle_s = DEFAULT.http_idle_s
        assert options_of(raw) == (1, idle_s, 2 * idle_s * 1_000)


async def test_a_socket_without_tcp_is_left_as_it_is() -> None:
    keep_alive(None)
    first, second = socket.socketpair()
    keep_alive(first)
    assert first.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    for end in (first, second, listener("127.0.0.1", 0)):
        end.close()
    await asyncio.sleep(0)
