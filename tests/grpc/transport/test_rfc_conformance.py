"""HTTP/2 by the letter, case by case, named by section of RFC 9113 (HTTP/2) and RFC 7541 (HPACK).

A case is the bytes of a client after the connection has begun, and the answer: the error of the connection, the error
of a stream, a status, or a call that is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pytest

from headrace.grpc.transport import frames
from headrace.grpc.transport.bounds import Bounds
from headrace.grpc.transport.budget import Budget
from headrace.grpc.transport.connection import Http2Connection
from headrace.grpc.transport.events import ConnectionFailed, RequestReceived
from headrace.grpc.transport.frames import PREFACE, ErrorCode, frame
from headrace.grpc.transport.headers import encode_block, encode_field
from tests.support.http2_frames import GREETING, framed, parsed

BASE: Final = {":method": "POST", ":scheme": "http", ":path": "/a/B", "content-type": "application/grpc"}
BLOCK: Final = encode_block(BASE)
BODY: Final = framed(b"hello")
END, HEADERS_END = frames.END_STREAM, frames.END_HEADERS
PING: Final = frame(frames.PING, 0, 0, b"12345678")
SERVED: Final = "served"
PROTOCOL, FLOW, SIZE, CLOSED, COMPRESSION, CALM, REFUSED = (
    ErrorCode.PROTOCOL_ERROR,
    ErrorCode.FLOW_CONTROL_ERROR,
    ErrorCode.FRAME_SIZE_ERROR,
    ErrorCode.STREAM_CLOSED,
    ErrorCode.COMPRESSION_ERROR,
    ErrorCode.ENHANCE_YOUR_CALM,
    ErrorCode.REFUSED_STREAM,
)


def connection_error(code: ErrorCode) -> str:
    """Name a connection error: GOAWAY with this code."""
    return f"connection {code.name}"


def stream_error(code: ErrorCode) -> str:
    """Name a stream error: RST_STREAM with this code."""
    return f"stream {code.name}"


def headers(stream_id: int = 1, block: bytes = BLOCK, flags: int = HEADERS_END) -> bytes:
    """HEADERS of a request."""
    return frame(frames.HEADERS, flags, stream_id, block)


def data(stream_id: int = 1, body: bytes = BODY, flags: int = END) -> bytes:
    """DATA of a request."""
    return frame(frames.DATA, flags, stream_id, body)


def call(stream_id: int = 1) -> bytes:
    """A complete call."""
    return headers(stream_id) + data(stream_id)


def request(fields: Mapping[str, str] | bytes) -> bytes:
    """A call with these headers."""
    return headers(1, fields if isinstance(fields, bytes) else encode_block(fields)) + data()


def without(name: str) -> dict[str, str]:
    """Return the usual headers without one."""
    return {key: value for key, value in BASE.items() if key != name}


PRIORITY_OF_5: Final = b"\x00\x00\x00\x00\x0f"

CASES: Final[dict[str, tuple[bytes, str]]] = {
    # -- RFC 9113, section 4: frames
    "4.1 a frame of an unknown kind is ignored": (frame(0x42, 0, 0, b"x") + call(), SERVED),
    "4.1 undefined flags are ignored": (frame(frames.PING, 0xFE, 0, b"12345678") + call(), SERVED),
    "4.1 the reserved bit of a stream id is ignored": (
        frames.frame_header(8, frames.PING, 0, 0x80000000) + b"12345678" + call(),
        SERVED,
    ),
    "4.2 DATA of the largest size is taken": (headers() + data(body=framed(b"x" * (16_384 - 5))), SERVED),
    "4.2 DATA over the largest size": (
        headers() + frames.frame_header(16_385, frames.DATA, 0, 1) + bytes(16_385),
        connection_error(SIZE),
    ),
    "4.2 HEADERS over the largest size": (
        frames.frame_header(16_385, frames.HEADERS, HEADERS_END, 1) + bytes(16_385),
        connection_error(SIZE),
    ),
    "4.3 a header block that can't be decoded": (headers(1, b"\xff" * 11), connection_error(COMPRESSION)),
    "4.3 a header block interrupted by another frame": (headers(flags=0) + PING, connection_error(PROTOCOL)),
    "4.3 a header block interrupted by HEADERS of another stream": (
        headers(flags=0) + headers(3),
        connection_error(PROTOCOL),
    ),
    "4.3 a header block interrupted by an unknown frame": (
        headers(flags=0) + frame(0x42, 0, 0, b"x"),
        connection_error(PROTOCOL),
    ),
    # -- section 5.1: states of a stream
    "5.1 idle: DATA": (data(), connection_error(PROTOCOL)),
    "5.1 idle: RST_STREAM": (frames.rst_stream(1, ErrorCode.CANCEL), connection_error(PROTOCOL)),
    "5.1 idle: WINDOW_UPDATE": (frames.window_update(1, 100), connection_error(PROTOCOL)),
    "5.1 idle: CONTINUATION": (frame(frames.CONTINUATION, HEADERS_END, 1, BLOCK), connection_error(PROTOCOL)),
    "5.1 idle: PRIORITY is taken": (frame(frames.PRIORITY, 0, 1, PRIORITY_OF_5) + call(), SERVED),
    "5.1 half closed: DATA": (call() + data(), connection_error(CLOSED)),
    "5.1 half closed: HEADERS": (call() + headers(flags=HEADERS_END | END), connection_error(CLOSED)),
    "5.1 half closed: CONTINUATION": (
        call() + frame(frames.CONTINUATION, HEADERS_END, 1, BLOCK),
        connection_error(PROTOCOL),
    ),
    "5.1 half closed: PRIORITY is taken": (call() + frame(frames.PRIORITY, 0, 1, PRIORITY_OF_5), SERVED),
    "5.1 half closed: WINDOW_UPDATE is taken": (call() + frames.window_update(1, 100), SERVED),
    "5.1 closed by RST_STREAM: DATA": (
        headers() + frames.rst_stream(1, ErrorCode.CANCEL) + data(),
        connection_error(CLOSED),
    ),
    "5.1 closed by RST_STREAM: HEADERS": (
        headers() + frames.rst_stream(1, ErrorCode.CANCEL) + headers(),
        connection_error(CLOSED),
    ),
    "5.1 closed by RST_STREAM: CONTINUATION": (
        headers() + frames.rst_stream(1, ErrorCode.CANCEL) + frame(frames.CONTINUATION, HEADERS_END, 1, BLOCK),
        connection_error(PROTOCOL),
    ),
    "5.1 closed by RST_STREAM: PRIORITY is taken": (
        headers() + frames.rst_stream(1, ErrorCode.CANCEL) + frame(frames.PRIORITY, 0, 1, PRIORITY_OF_5) + call(3),
        SERVED,
    ),
    "5.1 closed by RST_STREAM: RST_STREAM again is taken": (
        headers() + frames.rst_stream(1, ErrorCode.CANCEL) * 2 + call(3),
        SERVED,
    ),
    "5.1.1 an even stream id": (headers(2), connection_error(PROTOCOL)),
    "5.1.1 a stream id that is not larger than the last": (call(5) + headers(3), connection_error(PROTOCOL)),
    "5.1.1 HEADERS on stream 0": (headers(0), connection_error(PROTOCOL)),
    "5.1.2 more streams than allowed": (b"".join(headers(2 * n + 1) for n in range(9)), stream_error(REFUSED)),
    # -- section 5.3.2 and 6.3: PRIORITY
    "6.3 PRIORITY on stream 0": (frame(frames.PRIORITY, 0, 0, PRIORITY_OF_5), connection_error(PROTOCOL)),
    "6.3 PRIORITY of four bytes": (
        headers() + frame(frames.PRIORITY, 0, 1, b"1234") + call(3),
        stream_error(SIZE),
    ),
    "6.3 a stream that depends on itself, by HEADERS, is taken": (
        headers(1, b"\x00\x00\x00\x01\x0f" + BLOCK, HEADERS_END | frames.WITH_PRIORITY) + data(),
        SERVED,
    ),
    # -- section 6.1: DATA
    "6.1 DATA on stream 0": (data(0), connection_error(PROTOCOL)),
    "6.1 padding as long as the frame": (
        headers() + data(body=b"\x06abcde", flags=frames.PADDED | END),
        connection_error(PROTOCOL),
    ),
    "6.1 padding is removed": (
        headers() + data(body=b"\x02" + BODY + b"\0\0", flags=frames.PADDED | END),
        SERVED,
    ),
    # -- section 6.2: HEADERS
    "6.2 padding as long as the block": (
        headers(1, bytes((len(BLOCK) + 1,)) + BLOCK, HEADERS_END | frames.PADDED),
        connection_error(PROTOCOL),
    ),
    "6.2 padding and priority are removed": (
        headers(1, b"\x03" + PRIORITY_OF_5 + BLOCK + bytes(3), HEADERS_END | frames.PADDED | frames.WITH_PRIORITY)
        + data(),
        SERVED,
    ),
    "6.2 HEADERS with less than a priority": (
        headers(1, b"\x00\x00", HEADERS_END | frames.WITH_PRIORITY),
        connection_error(SIZE),
    ),
    # -- section 6.4: RST_STREAM
    "6.4 RST_STREAM on stream 0": (frames.rst_stream(0, ErrorCode.CANCEL), connection_error(PROTOCOL)),
    "6.4 RST_STREAM of three bytes": (headers() + frame(frames.RST_STREAM, 0, 1, b"123"), connection_error(SIZE)),
    # -- section 6.5: SETTINGS
    "6.5 SETTINGS on a stream": (frame(frames.SETTINGS, 0, 1, b""), connection_error(PROTOCOL)),
    "6.5 SETTINGS of three bytes": (frame(frames.SETTINGS, 0, 0, b"123"), connection_error(SIZE)),
    "6.5 an acknowledgement with a payload": (frame(frames.SETTINGS, frames.ACK, 0, bytes(6)), connection_error(SIZE)),
    "6.5.2 ENABLE_PUSH of 2": (frames.settings({frames.ENABLE_PUSH: 2}), connection_error(PROTOCOL)),
    "6.5.2 INITIAL_WINDOW_SIZE over the maximum": (
        frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31}),
        connection_error(FLOW),
    ),
    "6.5.2 MAX_FRAME_SIZE under the minimum": (
        frames.settings({frames.MAX_FRAME_SIZE: 16_383}),
        connection_error(PROTOCOL),
    ),
    "6.5.2 MAX_FRAME_SIZE over the maximum": (
        frames.settings({frames.MAX_FRAME_SIZE: 2**24}),
        connection_error(PROTOCOL),
    ),
    "6.5.2 an unknown setting is ignored": (frames.settings({0x99: 7}) + call(), SERVED),
    "6.5.3 several values of one setting": (
        frame(
            frames.SETTINGS,
            0,
            0,
            frames.SETTING.pack(frames.MAX_FRAME_SIZE, 100_000) + frames.SETTING.pack(frames.MAX_FRAME_SIZE, 16_384),
        )
        + call(),
        SERVED,
    ),
    # -- section 6.6: PUSH_PROMISE
    "6.6 PUSH_PROMISE from a client": (
        headers() + frame(frames.PUSH_PROMISE, HEADERS_END, 1, b"\0\0\0\x02" + BLOCK),
        connection_error(PROTOCOL),
    ),
    # -- section 6.7: PING
    "6.7 PING on a stream": (frame(frames.PING, 0, 1, b"12345678"), connection_error(PROTOCOL)),
    "6.7 PING of six bytes": (frame(frames.PING, 0, 0, b"123456"), connection_error(SIZE)),
    "6.7 an acknowledgement that was not asked for is ignored": (
        frame(frames.PING, frames.ACK, 0, b"12345678") + call(),
        SERVED,
    ),
    # -- section 6.8: GOAWAY
    "6.8 GOAWAY on a stream": (
        frame(frames.GOAWAY, 0, 1, bytes(8)),
        connection_error(PROTOCOL),
    ),
    "6.8 GOAWAY of four bytes": (frame(frames.GOAWAY, 0, 0, bytes(4)), connection_error(SIZE)),
    # -- section 6.9: WINDOW_UPDATE
    "6.9 an increment of 0 on the connection": (frames.window_update(0, 0), connection_error(PROTOCOL)),
    "6.9 an increment of 0 on a stream": (headers() + frames.window_update(1, 0), stream_error(PROTOCOL)),
    "6.9 WINDOW_UPDATE of three bytes": (frame(frames.WINDOW_UPDATE, 0, 0, b"123"), connection_error(SIZE)),
    "6.9.1 the connection's window overflows": (frames.window_update(0, 2**31 - 1), connection_error(FLOW)),
    "6.9.1 a stream's window overflows": (headers() + frames.window_update(1, 2**31 - 1), stream_error(FLOW)),
    "6.9.1 the reserved bit of an increment is ignored": (
        frame(frames.WINDOW_UPDATE, 0, 0, b"\x80\x00\x00\x01") + call(),
        SERVED,
    ),
    "6.9.2 a window that SETTINGS makes overflow": (
        headers() + frames.window_update(1, 2**31 - 1 - 65_535) + frames.settings({frames.INITIAL_WINDOW_SIZE: 65_536}),
        connection_error(FLOW),
    ),
    # -- section 6.10: CONTINUATION
    "6.10 several CONTINUATION frames": (
        headers(1, BLOCK[:5], 0)
        + frame(frames.CONTINUATION, 0, 1, BLOCK[5:9])
        + frame(frames.CONTINUATION, HEADERS_END, 1, BLOCK[9:])
        + data(),
        SERVED,
    ),
    "6.10 CONTINUATION on stream 0": (
        headers(flags=0) + frame(frames.CONTINUATION, HEADERS_END, 0, b""),
        connection_error(PROTOCOL),
    ),
    "6.10 CONTINUATION without HEADERS": (
        call() + frame(frames.CONTINUATION, HEADERS_END, 1, b""),
        connection_error(PROTOCOL),
    ),
    "6.10 CONTINUATION after END_HEADERS": (
        headers() + frame(frames.CONTINUATION, HEADERS_END, 1, b""),
        connection_error(PROTOCOL),
    ),
    "6.10 CONTINUATION after DATA": (
        headers() + data(flags=0) + frame(frames.CONTINUATION, HEADERS_END, 1, b""),
        connection_error(PROTOCOL),
    ),
    # -- section 8: requests
    "8.1 trailers without END_STREAM": (
        headers() + data(flags=0) + headers(1, encode_field("x", "y")),
        stream_error(PROTOCOL),
    ),
    "8.1 trailers that end the stream": (
        headers() + data(flags=0) + headers(1, encode_field("x", "y"), HEADERS_END | END),
        SERVED,
    ),
    "8.1 a pseudo-header in trailers": (
        headers() + data(flags=0) + headers(1, encode_field(":path", "/a"), HEADERS_END | END),
        stream_error(PROTOCOL),
    ),
    "8.1.1 a content-length that is not that of the body": (
        request(BASE | {"content-length": "1"}),
        stream_error(PROTOCOL),
    ),
    "8.1.1 a content-length over several DATA frames": (
        headers(1, encode_block(BASE | {"content-length": "11"})) + data(body=BODY[:4], flags=0) + data(body=BODY[4:]),
        stream_error(PROTOCOL),
    ),
    "8.1.1 a content-length that is no number": (request(BASE | {"content-length": "+10"}), stream_error(PROTOCOL)),
    "8.1.1 the content-length of the body": (request(BASE | {"content-length": "10"}), SERVED),
    "8.1.1 two content-lengths that differ": (
        request(BLOCK + encode_field("content-length", "9") + encode_field("content-length", "10")),
        stream_error(PROTOCOL),
    ),
    "8.2 an upper-case field name": (request(BLOCK + encode_field("X-Test", "y")), stream_error(PROTOCOL)),
    "8.2.1 a field name with a space": (request(BLOCK + encode_field("x y", "z")), stream_error(PROTOCOL)),
    "8.2.1 a field value with a line break": (request(BLOCK + encode_field("x", "a\nb")), stream_error(PROTOCOL)),
    "8.2.1 a field value that begins with a space": (request(BLOCK + encode_field("x", " a")), stream_error(PROTOCOL)),
    "8.2.1 a field value that ends with a tab": (request(BLOCK + encode_field("x", "a\t")), stream_error(PROTOCOL)),
    "8.2.1 an empty field name": (request(BLOCK + encode_field("", "a")), stream_error(PROTOCOL)),
    "8.2.2 connection": (request(BASE | {"connection": "keep-alive"}), stream_error(PROTOCOL)),
    "8.2.2 transfer-encoding": (request(BASE | {"transfer-encoding": "chunked"}), stream_error(PROTOCOL)),
    "8.2.2 te other than trailers": (request(BASE | {"te": "trailers, deflate"}), stream_error(PROTOCOL)),
    "8.2.2 te: trailers": (request(BASE | {"te": "trailers"}), SERVED),
    "8.3 an unknown pseudo-header": (request(encode_field(":test", "x") + BLOCK), stream_error(PROTOCOL)),
    "8.3 a pseudo-header of responses": (request(encode_field(":status", "200") + BLOCK), stream_error(PROTOCOL)),
    "8.3 a pseudo-header after a field": (
        request(encode_field("x", "y") + BLOCK),
        stream_error(PROTOCOL),
    ),
    "8.3 a pseudo-header twice": (request(encode_field(":method", "POST") + BLOCK), stream_error(PROTOCOL)),
    "8.3.1 no :method": (request(without(":method")), stream_error(PROTOCOL)),
    "8.3.1 no :scheme": (request(without(":scheme")), stream_error(PROTOCOL)),
    "8.3.1 no :path": (request(without(":path")), stream_error(PROTOCOL)),
    "8.3.1 an empty :path": (request(BASE | {":path": ""}), stream_error(PROTOCOL)),
    "8.3.1 a :path that does not begin with a slash": (request(BASE | {":path": "a/B"}), stream_error(PROTOCOL)),
    "8.3.1 an :authority and a host that differ": (
        request(encode_field(":authority", "a") + BLOCK + encode_field("host", "b")),
        stream_error(PROTOCOL),
    ),
    "8.3.1 an :authority": (request(encode_field(":authority", "a:1") + BLOCK), SERVED),
    # -- RFC 7541: HPACK
    "7541 2.3.3 an index beyond the tables": (headers(1, BLOCK + b"\xbf"), connection_error(COMPRESSION)),
    "7541 4.2 a table size update after a field": (headers(1, BLOCK + b"\x20"), connection_error(COMPRESSION)),
    "7541 5.1 an integer that overflows": (
        headers(1, BLOCK + b"\x7f" + b"\xff" * 12),
        connection_error(COMPRESSION),
    ),
    "7541 5.2 a Huffman string with the end symbol": (
        headers(1, BLOCK + b"\x00\x01x\x84\xff\xff\xff\xff"),
        connection_error(COMPRESSION),
    ),
    "7541 5.2 a Huffman string with padding of more than seven bits": (
        headers(1, BLOCK + b"\x00\x01x\x85\xff\xff\xff\xff\xff"),
        connection_error(COMPRESSION),
    ),
    "7541 5.2 a Huffman string with padding of zeros": (
        headers(1, BLOCK + b"\x00\x01x\x81\x18"),
        connection_error(COMPRESSION),
    ),
    "7541 6.1 index 0": (headers(1, BLOCK + b"\x80"), connection_error(COMPRESSION)),
    "7541 6.3 a table size over the one that was announced": (
        headers(1, b"\x3f\xe2\x1f" + BLOCK),
        connection_error(COMPRESSION),
    ),
    "7541 6.3 a table size of 0": (headers(1, b"\x20" + BLOCK) + data(), SERVED),
}


def outcome_of(sent: bytes) -> str:
    """Return what a server made of the bytes of a client."""
    connection = Http2Connection(Bounds(message_bytes_max=100_000, calls_max=8), Budget(10**9))
    connection.feed(GREETING, now_us=0)
    connection.take_output()
    events = connection.feed(sent, now_us=0)
    written = b""
    while piece := connection.take_output():
        written += piece
    for kind, _, _, payload in parsed(written):
        if kind == frames.GOAWAY:
            return connection_error(ErrorCode(int.from_bytes(payload[4:8], "big")))
    assert not any(isinstance(event, ConnectionFailed) for event in events)
    for kind, _, _, payload in parsed(written):
        if kind == frames.RST_STREAM and payload != bytes(4):
            return stream_error(ErrorCode(int.from_bytes(payload, "big")))
    return SERVED if any(isinstance(event, RequestReceived) for event in events) else "nothing"


@pytest.mark.parametrize("case", CASES)
def test_a_server_answers_by_the_letter(case: str) -> None:
    sent, expected = CASES[case]
    assert outcome_of(sent) == expected


@pytest.mark.parametrize("stream_id", [3, 5])
def test_6_9_an_error_of_one_stream_leaves_the_others(stream_id: int) -> None:
    assert outcome_of(headers() + frames.window_update(1, 0) + call(stream_id)).startswith("stream")


def test_3_4_an_invalid_preface_ends_the_connection() -> None:
    connection = Http2Connection(Bounds(100_000, 8), Budget(10**9))
    (event,) = connection.feed(b"GET / HTTP/1.1\r\n\r\n", now_us=0)
    assert isinstance(event, ConnectionFailed)
    assert event.error_code is PROTOCOL


def test_3_4_the_preface_is_followed_by_settings() -> None:
    connection = Http2Connection(Bounds(100_000, 8), Budget(10**9))
    (event,) = connection.feed(PREFACE + PING, now_us=0)
    assert isinstance(event, ConnectionFailed)
    assert event.error_code is PROTOCOL


def test_6_5_3_settings_are_acknowledged_and_6_7_pings_are_answered_with_their_bytes() -> None:
    connection = Http2Connection(Bounds(100_000, 8), Budget(10**9))
    connection.feed(GREETING, now_us=0)
    connection.take_output()
    connection.feed(frames.settings({}) + PING, now_us=0)
    written = [(kind, flags, payload) for kind, flags, _, payload in parsed(connection.take_output())]
    assert written == [(frames.SETTINGS, frames.ACK, b""), (frames.PING, frames.ACK, b"12345678")]
