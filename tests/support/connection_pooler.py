"""A pooler that behaves like the strictest ones: each transaction uses another server session, without its former
state.

It speaks version 3.0 of PostgreSQL's protocol on both sides. A client gets a process id that no server session has.
Startup parameters that stock PgBouncer does not know are refused with its message. A session is put back at
`ReadyForQuery` outside a transaction, and the next transaction of any client takes the oldest free session. With
`forgets`, `DISCARD ALL` is sent to a session before the next client gets it; otherwise a client finds what another
left.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import urlsplit

from tests.support.postgres_server import server

SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST = 80877103, 80877104, 80877102
KNOWN_PARAMETERS = {
    "user", "database", "client_encoding", "datestyle", "timezone", "standard_conforming_strings", "application_name",
}  # fmt: skip


@dataclass(eq=False)
class Session:
    """One connection to the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    greeting: bytes = b""
    key: bytes = b""
    clients: set[bytes] = field(default_factory=set)


class Pooler:
    """A pooler on `port` of the loopback, after `start`. All of it belongs to the event loop that started it."""

    def __init__(self, host: str, port: int, *, sessions_count: int = 4, forgets: bool = True) -> None:
        self._server_at = host, port
        self._sessions_count = sessions_count
        self._forgets = forgets
        self._free: deque[Session] = deque()
        self._all: list[Session] = []
        self._given_back = asyncio.Condition()
        self._working: dict[bytes, Session] = {}
        self.refused: list[str] = []
        self.transactions_count = 0
        self.port = 0

    async def start(self) -> None:
        """Begin to listen. Sessions are opened for the first client, as the user that it names."""
        listening = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = listening.sockets[0].getsockname()[1]

    @property
    def most_shared(self) -> int:
        """Return how many clients the most shared session has served."""
        return max(len(session.clients) for session in self._all)

    # -- the client's side

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            parameters = await self._greeted(reader, writer)
            if parameters is not None:
                await self._relay(reader, writer, await self._welcome(writer, parameters))
        writer.close()

    async def _greeted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, str] | None:
        """Read the startup parameters of a client that stays connected."""
        while True:
            (length,) = struct.unpack("!I", await reader.readexactly(4))
            body = await reader.readexactly(length - 4)
            (code,) = struct.unpack("!I", body[:4])
            if code in (SSL_REQUEST, GSS_REQUEST):
                writer.write(b"N")
                continue
            if code == CANCEL_REQUEST:
                await self._cancel(body[4:])
                return None
            words = body[4:].rstrip(b"\0").decode().split("\0")
            parameters = dict(zip(words[::2], words[1::2], strict=True))
            unknown = sorted(set(parameters) - KNOWN_PARAMETERS)
            if unknown:
                self.refused += unknown
                error = f"SFATAL\0C08P01\0Munsupported startup parameter: {unknown[0]}\0\0".encode()
                writer.write(b"E" + struct.pack("!I", len(error) + 4) + error)
                await writer.drain()
                return None
            return parameters

    async def _welcome(self, writer: asyncio.StreamWriter, parameters: dict[str, str]) -> bytes:
        """Send what a server sends after a login, and return the cancellation key of the client."""
        if not self._all:
            sessions = [await self._connect(parameters) for _ in range(self._sessions_count)]
            if not self._all:
                self._all, self._free = sessions, deque(sessions)
        key = secrets.token_bytes(8)
        writer.write(b"R\0\0\0\x08\0\0\0\0" + self._all[0].greeting + b"K\0\0\0\x0c" + key + b"Z\0\0\0\x05I")
        return key

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
        """Run each transaction on the session that has been free longest."""
        session: Session | None = None
        answering: asyncio.Task[bytes] | None = None
        try:
            while True:
                kind, request = await _message(reader)
                if kind == b"X":
                    return
                session = session or await self._take(key)
                answering = answering or asyncio.create_task(_answer(session, writer))
                session.writer.write(request)
                if kind not in b"QS":
                    continue
                ready, answering = await answering, None
                if ready[-1:] == b"I":
                    taken, session = session, None
                    await self._give_back(taken, key)
                writer.write(ready)
                await writer.drain()
        finally:
            if answering is not None:
                answering.cancel()
            if session is not None:  # the client disconnected inside a transaction
                self._all.remove(session)
                self._working.pop(key, None)
                session.writer.close()
                fresh = await self._connect({"user": "postgres", "database": "postgres"})
                self._all.append(fresh)
                await self._give_back(fresh, key)

    async def _take(self, key: bytes) -> Session:
        async with self._given_back:
            await self._given_back.wait_for(lambda: self._free)
            session = self._free.popleft()
        self._working[key] = session
        session.clients.add(key)
        self.transactions_count += 1
        return session

    async def _give_back(self, session: Session, key: bytes) -> None:
        self._working.pop(key, None)
        if self._forgets:
            discard = b"DISCARD ALL\0"
            session.writer.write(b"Q" + struct.pack("!I", len(discard) + 4) + discard)
            while (await _message(session.reader))[0] != b"Z":
                pass
        async with self._given_back:
            self._free.append(session)
            self._given_back.notify()

    # -- the server's side

    async def _connect(self, parameters: dict[str, str]) -> Session:
        reader, writer = await asyncio.open_connection(*self._server_at)
        body = struct.pack("!I", 196608) + b"".join(
            word.encode() + b"\0" for pair in parameters.items() for word in pair
        )
        writer.write(struct.pack("!I", len(body) + 5) + body + b"\0")
        session = Session(reader, writer)
        while True:
            kind, message = await _message(reader)
            assert kind != b"E", message
            if kind == b"S":
                session.greeting += message
            elif kind == b"K":
                session.key = message[5:]
            elif kind == b"Z":
                return session

    async def _cancel(self, key: bytes) -> None:
        session = self._working.get(key)
        if session is None:
            return
        _, writer = await asyncio.open_connection(*self._server_at)
        writer.write(struct.pack("!II", 8 + len(session.key), CANCEL_REQUEST) + session.key)
        await writer.drain()
        writer.close()


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readexactly(5)
    (length,) = struct.unpack("!I", head[1:])
    return head[:1], head + await reader.readexactly(length - 4)


async def _answer(session: Session, writer: asyncio.StreamWriter) -> bytes:
    """Forward what a session sends except its `ReadyForQuery`, which is returned."""
    while True:
        kind, message = await _message(session.reader)
        if kind == b"Z":
            return message
        writer.write(message)
        await writer.drain()


@cache
def pooler(*, forgets: bool = True) -> Pooler:
    """Return the one pooler of this test run, on a thread and an event loop of its own."""
    parts = urlsplit(server().dsn)
    assert parts.hostname is not None
    assert parts.port is not None
    started = threading.Event()
    made: list[Pooler] = []

    async def serve() -> None:
        made.append(Pooler(parts.hostname or "", parts.port or 0, forgets=forgets))
        await made[0].start()
        started.set()
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve()), name="test-pooler", daemon=True).start()
    assert started.wait(10)
    return made[0]


def pooled_dsn(*, forgets: bool = True) -> str:
    """Return the test server's DSN through the pooler."""
    return server().dsn.replace(f":{urlsplit(server().dsn).port}", f":{pooler(forgets=forgets).port}")
