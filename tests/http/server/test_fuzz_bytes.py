"""Random bytes on the port of a server: HTTP/1 heads and bodies, HTTP/2 frames, and bodies of the store's operations.

Nothing is answered with 500, nothing is logged as an error, and another peer is answered afterwards.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import PREFACE
from headrace.store.rpc import CONTENT_TYPE, OPERATIONS
from tests.support.http2_frames import GREETING, framed
from tests.support.http_server import AUTH, KEY, LIMITS, HttpPeer, running_server

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
KEY_LINE = f"authorization: Bearer {KEY}\r\n".encode()
SHORT_S = 0.03
"""Time in which a server answers or not: a peer that owes it bytes gets no answer."""


class ErrorLog(logging.Handler):
    """Log lines of the level ERROR and above, of all loggers."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())


class Served:
    """A server in a thread of its own, and the errors that it logged."""

    def __init__(self, address: tuple[str, int], batch_id: str, errors: ErrorLog) -> None:
        self.address = address
        self.batch_id = batch_id
        self.errors = errors

    def exchange(self, *pieces: bytes) -> bytes:
        """Send pieces on one connection and return what comes back; then ask as another peer."""
        return asyncio.run(self._exchange(pieces))

    async def _exchange(self, pieces: tuple[bytes, ...]) -> bytes:
        reader, writer = await asyncio.open_connection(*self.address)
        answer = b""
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            async with asyncio.timeout(SHORT_S):
                while data := await reader.read(1 << 16):
                    answer += data
        except (ConnectionError, TimeoutError):
            pass
        finally:
            writer.transport.abort()
        other = HttpPeer(*self.address)
        assert (await other.ask("GET", "/healthz")).status == 200
        await other.close()
        assert self.errors.lines == []
        return answer

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Any:
        """Send a whole request and return its response; then ask as another peer."""

        async def ask() -> Any:
            peer, other = HttpPeer(*self.address), HttpPeer(*self.address)
            try:
                return await peer.ask(method, path, body, headers)
            finally:
                assert (await other.ask("GET", "/healthz")).status == 200
                await peer.close()
                await other.close()
                assert self.errors.lines == []

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run a server for all examples of this module."""
    folder = Path(tmp_path_factory.mktemp("fuzz"))
    errors, ready, over = ErrorLog(), threading.Event(), threading.Event()
    servers: list[Served] = []

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: errors.lines.append(str(context)))
        async with running_server(folder, "sqlite", limits=LIMITS) as server:
            batch_id = await server.create(10)
            servers.append(Served(server.server.address, batch_id, errors))
            ready.set()
            await asyncio.to_thread(over.wait)

    logging.getLogger().addHandler(errors)
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait(30)
    try:
        yield servers[0]
    finally:
        over.set()
        thread.join()
        logging.getLogger().removeHandler(errors)


# -- HTTP/1

token = st.text("abcXYZ019-_!#$%&'*+.^`|~", min_size=1, max_size=12).map(str.encode)
value = st.one_of(
    st.binary(max_size=30), st.sampled_from([b"", b"0", b"-1", b"9" * 40, b"chunked", b"gzip", b"\x00", b"\xff"])
)
field = st.one_of(
    st.tuples(token, value),
    st.tuples(
        st.sampled_from(
            [b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect",
             b"content-encoding", b"content-type", b"authorization", b"x-request-id", b"trailer", b"te", b"origin"]
        ),
        st.one_of(
            value,
            st.sampled_from(
                [b"close", b"keep-alive", b"100-continue", b"websocket", b"h2c", b"chunked, gzip", b"zstd", b"5",
                 b"5, 5", b"application/json", b"application/x-ndjson"]
            ),
        ),
    ),
)  # fmt: skip
method = st.one_of(
    token, st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"CONNECT", b"PRI"])
)
target = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.sampled_from(
        [b"/", b"*", b"/v1/batches", b"/v1/batches?x=%ff", b"/%00", b"/%2e%2e/x", b"//", b"http://x/v1/batches",
         b"/v1/runs/%F0%9F%98%80", b"/api/packets/61/%2e%2e%2f?until=1&signature=0", b"/v1/objects/..%2f..", b"/docs",
         b"/v1/batches/" + b"a" * 3_000]
    ),
)  # fmt: skip
version = st.sampled_from(
    [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"", b"http/1.1"]
)
ending = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b""])
chunk = st.one_of(
    st.binary(max_size=40).map(lambda data: b"%x\r\n%s\r\n" % (len(data), data)),
    st.sampled_from(
        [b"0\r\n\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n", b"5;x=y\r\n12345\r\n", b"0\r\nx: y\r\n\r\n", b"zz\r\n"]
    ),
)
body = st.one_of(st.binary(max_size=120), st.lists(chunk, max_size=5).map(b"".join))


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Draw a request that is more or less well-formed."""
    line = b" ".join((draw(method), draw(target), draw(version))) + draw(ending)
    fields = b"".join(name + b": " + text + draw(ending) for name, text in draw(st.lists(field, max_size=6)))
    host = draw(st.sampled_from([b"host: test\r\n", b"host: test\r\n", b"", b"host: a\r\nhost: b\r\n"]))
    key = draw(st.sampled_from([b"", KEY_LINE]))
    return line + host + key + fields + draw(ending) + draw(body)


def statuses_of(answer: bytes) -> list[int]:
    """Return the statuses of the responses in a stream of bytes."""
    return [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


@given(data=st.lists(requests(), min_size=1, max_size=3), cut=st.integers(1, 60))
@FUZZ
def test_random_http_1_requests_are_answered_or_cut_off(served: Served, data: list[bytes], cut: int) -> None:
    whole = b"".join(data)
    answer = served.exchange(whole[:cut], whole[cut:])
    assert not [status for status in statuses_of(answer) if status >= 500], (whole, answer)


@given(data=st.binary(min_size=1, max_size=300))
@FUZZ
def test_random_bytes_are_answered_or_cut_off(served: Served, data: bytes) -> None:
    answer = served.exchange(data)
    assert not [status for status in statuses_of(answer) if status >= 500], (data, answer)


# -- HTTP/2

integer = st.sampled_from([0, 1, 2, 3, 5, 0x7FFFFFFF, 0xFFFFFFFF])
hpack_field = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [b"\x82", b"\x83", b"\x86", b"\x84", b"\x3f\xe1\xff\x03", b"\x20", b"\xff\xff\xff\xff\xff\x0f",
         b"\x40\x82\xff\xff", b"\x00\x85\xff\xff\xff\xff\xff\x01a", b"\x40\x01a\x01b", b"\xbe",
         b"\x00\x00\x00", b"\x7f\x00"]
    ),
)  # fmt: skip
request_block = b"\x83\x86\x44\x02/x\x5f\x10application/grpc"
payload = st.one_of(
    st.binary(max_size=40),
    st.lists(hpack_field, max_size=6).map(lambda fields: request_block + b"".join(fields)),
    st.tuples(st.integers(0, 9), integer).map(lambda pair: struct.pack(">HI", *pair)),
    integer.map(lambda number: struct.pack(">I", number)),
    st.binary(max_size=20).map(framed),
    st.binary(max_size=20).map(lambda data: framed(gzip.compress(data), 1)),
)
any_frame = st.builds(
    frames.frame,
    st.one_of(st.integers(0, 9), st.integers(0, 255)),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D, 0xFF]),
    st.sampled_from([0, 1, 1, 3, 5, 2, 0x7FFFFFFF]),
    payload,
)


@given(data=st.lists(any_frame, min_size=1, max_size=10), cut=st.integers(1, 60))
@FUZZ
def test_random_frames_end_at_most_their_own_connection(served: Served, data: list[bytes], cut: int) -> None:
    whole = GREETING + b"".join(data)
    served.exchange(whole[:cut], whole[cut:])


@given(data=st.binary(min_size=1, max_size=200))
@FUZZ
def test_random_bytes_after_the_preface_end_at_most_their_own_connection(served: Served, data: bytes) -> None:
    served.exchange(PREFACE + data)


# -- bodies

json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=6) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
item_names = st.sampled_from(
    ["index", "task", "payload", "options", "payloadType", "x", "\x00", "tags", "delay", "metadata"]
)
item = st.dictionaries(item_names, json_value, max_size=5).map(
    lambda fields: msgspec.json.encode({"index": 0, "task": "task"} | _encodable(fields))
)
line = st.one_of(
    item, st.binary(max_size=40), st.sampled_from([b"{" * 3_000, b"\x1f\x8b\x08", b"\xef\xbb\xbf{}", b"[]", b"0"])
)


def _encodable(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that JSON can encode."""
    encodable = {}
    for name, each in fields.items():
        try:
            msgspec.json.encode(each)
        except (ValueError, OverflowError, UnicodeEncodeError):
            continue
        encodable[name] = each
    return encodable


@given(
    lines=st.lists(line, max_size=5),
    encoding=st.sampled_from(["", "gzip", "zstd", "cut"]),
    api=st.sampled_from(["/v1", "/api/v3"]),
)
@FUZZ
def test_random_lines_of_items_are_stored_or_refused(
    served: Served, lines: list[bytes], encoding: str, api: str
) -> None:
    data = b"\n".join(lines)
    headers = {"content-type": "application/x-ndjson"}
    if encoding in ("gzip", "cut"):
        data = gzip.compress(data)[: -3 if encoding == "cut" else None]
        headers["content-encoding"] = "gzip"
    elif encoding:
        headers["content-encoding"] = encoding  # but it is not
    answer = served.ask("POST", f"{api}/batches/{served.batch_id}/items", data, AUTH | headers)
    assert answer.status in (200, 400, 408, 409, 413, 415, 422), (data, answer)


message_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=6)
    | st.binary(max_size=6)
    | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw an operation of the store with a body: its fields with values of any type, or any bytes."""
    verb = draw(st.sampled_from(sorted(OPERATIONS)))
    names = [field.encode_name for field in msgspec.structs.fields(OPERATIONS[verb].request)]
    fields = draw(st.fixed_dictionaries(dict.fromkeys(names, message_value)))
    encoded = msgspec.msgpack.encode(fields)
    nested = b"\x91" * 5_000
    return verb, draw(st.sampled_from([encoded, encoded, encoded[:-1], nested, b"\xdd\xff\xff\xff\xff", b"\xc1", b""]))


@given(message=messages(), is_compressed=st.booleans())
@FUZZ
def test_random_messages_to_the_store_are_answered_or_refused(
    served: Served, message: tuple[str, bytes], is_compressed: bool
) -> None:
    verb, data = message
    headers = {"content-type": CONTENT_TYPE}
    if is_compressed:
        data, headers = gzip.compress(data), headers | {"content-encoding": "gzip"}
    answer = served.ask("POST", f"/v1/store/{verb}", data, AUTH | headers)
    assert answer.status < 500, (verb, data, answer)


@given(
    data=st.lists(st.binary(max_size=30), max_size=4), verb=st.sampled_from(["settle", "release", "claim", "append"])
)
@FUZZ
def test_random_bytes_to_the_store_are_refused(served: Served, data: list[bytes], verb: str) -> None:
    answer = served.ask("POST", f"/v1/store/{verb}", b"".join(data), AUTH | {"content-type": CONTENT_TYPE})
    assert 400 <= answer.status < 500, (verb, data, answer)
