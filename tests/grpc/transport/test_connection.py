"""The HTTP/2 state machine: for any input, however it is split, it keeps its bounds and answers in HTTP/2."""

from __future__ import annotations

import struct
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.grpc.transport import frames
from headrace.grpc.transport.bounds import Bounds
from headrace.grpc.transport.budget import Budget
from headrace.grpc.transport.connection import CONNECTION_WINDOW, CONTINUATIONS_MAX, Http2Connection
from headrace.grpc.transport.events import (
    ConnectionFailed,
    Event,
    GoAwayReceived,
    RequestReceived,
    ResponseReceived,
    StreamReset,
)
from headrace.grpc.transport.frames import PREFACE, ErrorCode, frame
from headrace.grpc.transport.headers import (
    BLOCK_BYTES_MAX,
    LIST_BYTES_MAX,
    decode_status_message,
    encode_block,
    encode_field,
)
from headrace.grpc.transport.sender import ALLOWANCE_MAX, STREAM_WINDOW
from headrace.grpc.transport.status import Code
from tests.support.http2_frames import GREETING, framed, parsed

BOUNDS = Bounds(message_bytes_max=100_000, calls_max=8)
REQUEST_FIELDS = encode_block(
    {":method": "POST", ":scheme": "http", ":path": "/a/B", "content-type": "application/grpc"}
)


def new_server(bounds: Bounds = BOUNDS, budget: Budget | None = None) -> Http2Connection:
    """A server connection before any input."""
    return Http2Connection(bounds, budget or Budget(10**9))


def connected(bounds: Bounds = BOUNDS) -> Http2Connection:
    """A server connection after the preface and SETTINGS were exchanged."""
    connection = new_server(bounds)
    assert connection.feed(GREETING, now_us=0) == []
    connection.take_output()
    return connection


def headers(stream_id: int, fields: bytes = REQUEST_FIELDS, flags: int = frames.END_HEADERS) -> bytes:
    """HEADERS of a request."""
    return frame(frames.HEADERS, flags, stream_id, fields)


def call(stream_id: int, message: bytes = b"hello") -> bytes:
    """A complete call."""
    return headers(stream_id) + frame(frames.DATA, frames.END_STREAM, stream_id, framed(message))


def output_of(connection: Http2Connection) -> bytes:
    """All output of a connection for now."""
    output = b""
    while piece := connection.take_output():
        output += piece
    return output


# -- split and invalid input

CALLS = GREETING + b"".join(
    (
        call(1, b"one"),
        frame(frames.PING, 0, 0, b"12345678"),
        frame(frames.HEADERS, 0, 3, REQUEST_FIELDS[:9]),
        frame(frames.CONTINUATION, frames.END_HEADERS, 3, REQUEST_FIELDS[9:]),
        frame(frames.DATA, frames.PADDED, 3, b"\x04" + framed(b"three")[:6] + b"\0\0\0\0"),
        frame(frames.DATA, frames.END_STREAM, 3, framed(b"three")[6:]),
        frame(frames.HEADERS, frames.END_HEADERS | frames.WITH_PRIORITY, 5, b"\0\0\0\0\x10" + REQUEST_FIELDS),
        frame(frames.RST_STREAM, 0, 5, struct.pack(">I", ErrorCode.CANCEL)),
        frame(99, 7, 0, b"a frame of unknown kind"),
        frames.window_update(0, 70_000),
        frames.settings({frames.INITIAL_WINDOW_SIZE: 10, frames.HEADER_TABLE_SIZE: 0}),
        call(7, b""),
        frame(frames.GOAWAY, 0, 0, struct.pack(">II", 0, 0) + b"bye"),
    )
)


@given(st.lists(st.integers(0, len(CALLS)), max_size=12))
def test_bytes_give_the_same_events_however_they_are_split(cuts: list[int]) -> None:
    whole, cut = new_server(), new_server()
    expected = whole.feed(CALLS, now_us=5)
    events: list[Event] = []
    places = [0, *sorted(cuts), len(CALLS)]
    for start, stop in pairwise(places):
        events += cut.feed(CALLS[start:stop], now_us=5)
    assert events == expected
    assert [event.stream_id for event in expected if isinstance(event, RequestReceived)] == [1, 3, 7]
    assert [event.message for event in expected if isinstance(event, RequestReceived)] == [b"one", b"three", b""]
    assert expected[2] == StreamReset(5, ErrorCode.CANCEL)
    assert expected[-1] == GoAwayReceived(0, 0)
    assert output_of(cut) == output_of(whole)


def test_bytes_fed_one_by_one_give_the_same_events() -> None:
    whole, cut = new_server(), new_server()
    events: list[Event] = []
    for place in range(len(CALLS)):
        events += cut.feed(CALLS[place : place + 1], now_us=5)
    assert events == whole.feed(CALLS, now_us=5)
    assert output_of(cut) == output_of(whole)


@given(st.binary(min_size=1, max_size=400).filter(lambda data: not PREFACE.startswith(data[:24])))
def test_garbage_is_answered_with_goaway_and_nothing_else(data: bytes) -> None:
    connection = new_server()
    (event,) = connection.feed(data, now_us=0)
    assert isinstance(event, ConnectionFailed)
    written = [kind for kind, _, _, _ in parsed(output_of(connection))]
    assert written == [frames.SETTINGS, frames.WINDOW_UPDATE, frames.GOAWAY]
    assert connection.feed(data, now_us=0) == []
    assert output_of(connection) == b""


def any_frame() -> st.SearchStrategy[bytes]:
    """Frames that are almost right, sometimes."""
    payloads = st.one_of(
        st.binary(max_size=40),
        st.just(REQUEST_FIELDS),
        st.just(framed(b"hello")),
        st.integers(0, 2**32 - 1).map(frames.WORD.pack),
        st.tuples(st.integers(0, 9), st.integers(0, 2**32 - 1)).map(lambda pair: frames.SETTING.pack(*pair)),
    )
    return st.builds(frame, st.integers(0, 12), st.integers(0, 255), st.integers(0, 9), payloads)


@given(
    st.lists(st.one_of(any_frame(), any_frame(), st.sampled_from([call(n) for n in range(1, 30, 2)])), max_size=30),
    st.booleans(),
)
@settings(max_examples=300)
def test_arbitrary_frames_fail_at_most_their_own_connection(pieces: list[bytes], is_client: bool) -> None:
    budget = Budget(1_000)
    connection = Http2Connection(BOUNDS, budget, is_client=is_client)
    if is_client:
        connection.start_call(REQUEST_FIELDS, b"hello")
        connection.start_call(REQUEST_FIELDS, b"x" * 70_000)
    connection.feed(frames.settings({}) if is_client else GREETING, now_us=0)
    for number, piece in enumerate(pieces):
        events = connection.feed(piece, now_us=number)
        for event in events:
            if isinstance(event, RequestReceived):
                connection.send_response(event.stream_id, b"z" * (event.stream_id * 20_000))
            if isinstance(event, StreamReset):
                connection.handler_ended(event.stream_id)
    written = output_of(connection)
    kinds = [kind for kind, _, _, _ in parsed(written.removeprefix(PREFACE))]
    assert (frames.GOAWAY in kinds) == connection.is_broken
    assert connection.streams_count <= BOUNDS.calls_max
    connection.close()
    assert budget.held_bytes == 0
    assert connection.pending_bytes == 0


# -- protocol violations

BROKEN: dict[str, tuple[bytes, ErrorCode]] = {
    "a frame over the limit": (frames.frame_header(16_385, frames.DATA, 0, 1), ErrorCode.FRAME_SIZE_ERROR),
    "DATA on an idle stream": (frame(frames.DATA, 0, 1, b"x"), ErrorCode.PROTOCOL_ERROR),
    "DATA on stream 0": (frame(frames.DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "HEADERS on stream 0": (headers(0), ErrorCode.PROTOCOL_ERROR),
    "HEADERS on a server's stream": (headers(2), ErrorCode.PROTOCOL_ERROR),
    "DATA after the end": (call(1) + frame(frames.DATA, 0, 1, b"x"), ErrorCode.STREAM_CLOSED),
    "HEADERS after the end": (call(1) + headers(1), ErrorCode.STREAM_CLOSED),
    "a header block interrupted by PING": (
        headers(1, flags=0) + frame(frames.PING, 0, 0, b"12345678"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a header block continued on another stream": (
        headers(1, flags=0) + frame(frames.CONTINUATION, 0, 3, b""),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "CONTINUATION without HEADERS": (frame(frames.CONTINUATION, 0, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "an invalid header block": (
        headers(1, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a header list over the limit": (
        headers(1, encode_field("a", "x" * 4_000) + b"\x40\x01a\x7f\xa1\x1e" + b"x" * 4_000 + b"\xbe" * 5),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a frame of nothing but padding": (
        frame(frames.HEADERS, frames.PADDED | frames.END_HEADERS, 1, b"\x05abc"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "HEADERS with a truncated priority": (
        frame(frames.HEADERS, frames.WITH_PRIORITY | frames.END_HEADERS, 1, b"abc"),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "PRIORITY of four bytes": (frame(frames.PRIORITY, 0, 1, b"abcd"), ErrorCode.FRAME_SIZE_ERROR),
    "RST_STREAM of three bytes": (call(1) + frame(frames.RST_STREAM, 0, 1, b"abc"), ErrorCode.FRAME_SIZE_ERROR),
    "RST_STREAM on an idle stream": (frame(frames.RST_STREAM, 0, 1, b"abcd"), ErrorCode.PROTOCOL_ERROR),
    "SETTINGS on a stream": (frame(frames.SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
    "truncated SETTINGS": (frame(frames.SETTINGS, 0, 0, b"abc"), ErrorCode.FRAME_SIZE_ERROR),
    "a SETTINGS acknowledgement with content": (
        frame(frames.SETTINGS, frames.ACK, 0, b"abcdef"),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "an initial window of 2^31": (frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31}), ErrorCode.FLOW_CONTROL_ERROR),
    "a frame size below the minimum": (frames.settings({frames.MAX_FRAME_SIZE: 100}), ErrorCode.PROTOCOL_ERROR),
    "a frame size above the maximum": (frames.settings({frames.MAX_FRAME_SIZE: 1 << 24}), ErrorCode.PROTOCOL_ERROR),
    "ENABLE_PUSH of 2": (frames.settings({frames.ENABLE_PUSH: 2}), ErrorCode.PROTOCOL_ERROR),
    "a push": (frame(frames.PUSH_PROMISE, 0, 1, b"abcd"), ErrorCode.PROTOCOL_ERROR),
    "PING on a stream": (frame(frames.PING, 0, 1, b"12345678"), ErrorCode.PROTOCOL_ERROR),
    "PING of seven bytes": (frame(frames.PING, 0, 0, b"1234567"), ErrorCode.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE by 0": (frames.window_update(0, 0), ErrorCode.PROTOCOL_ERROR),
    "a connection window that overflows": (frames.window_update(0, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
    "a stream window that overflows by SETTINGS": (
        call(1) + frames.window_update(1, 2**31 - 1 - 65_535) + frames.settings({frames.INITIAL_WINDOW_SIZE: 65_536}),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "WINDOW_UPDATE of three bytes": (frame(frames.WINDOW_UPDATE, 0, 0, b"abc"), ErrorCode.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE on an idle stream": (frames.window_update(9, 1), ErrorCode.PROTOCOL_ERROR),
    "truncated GOAWAY": (frame(frames.GOAWAY, 0, 0, b"abc"), ErrorCode.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_protocol_violation_ends_the_connection_with_its_error_code(name: str) -> None:
    data, error_code = BROKEN[name]
    connection = connected()
    event = connection.feed(data, now_us=0)[-1]
    assert isinstance(event, ConnectionFailed), event
    assert event.error_code is error_code
    kind, _, _, payload = parsed(output_of(connection))[-1]
    assert (kind, payload[4:8]) == (frames.GOAWAY, frames.WORD.pack(error_code))


def test_a_first_frame_other_than_settings_ends_the_connection() -> None:
    (event,) = new_server().feed(PREFACE + frame(frames.PING, 0, 0, b"12345678"), now_us=0)
    assert isinstance(event, ConnectionFailed)


FLOODS = {
    "pings": frame(frames.PING, 0, 0, b"12345678"),
    "settings": frames.settings({}),
    "acknowledgements": frame(frames.SETTINGS, frames.ACK, 0),
    "priorities": frame(frames.PRIORITY, 0, 1, b"abcde"),
    "windows": frames.window_update(0, 1),
    "unknown frames": frame(77, 0, 0, b"x"),
    "goaways": frame(frames.GOAWAY, 0, 0, bytes(8)),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_frames_without_calls_ends_the_connection(name: str) -> None:
    connection = connected()
    event = connection.feed(FLOODS[name] * (ALLOWANCE_MAX + 1), now_us=0)[-1]
    assert isinstance(event, ConnectionFailed), event
    assert event.error_code is ErrorCode.ENHANCE_YOUR_CALM


def test_the_same_frames_over_a_longer_time_are_accepted() -> None:
    connection = connected()
    for second in range(200):
        assert connection.feed(FLOODS["pings"] * 50, now_us=second * 1_000_000) == []
        connection.take_output()


def test_endless_empty_data_frames_end_the_connection() -> None:
    connection = connected()
    event = connection.feed(headers(1) + frame(frames.DATA, 0, 1) * (ALLOWANCE_MAX + 1), now_us=0)[-1]
    assert isinstance(event, ConnectionFailed)
    assert event.error_code is ErrorCode.ENHANCE_YOUR_CALM


def test_rapid_resets_end_the_connection_and_never_exceed_the_stream_limit() -> None:
    connection = connected()
    for stream_id in range(1, 10_000, 2):
        events = connection.feed(call(stream_id) + frame(frames.RST_STREAM, 0, stream_id, bytes(4)), now_us=0)
        assert connection.streams_count <= BOUNDS.calls_max
        if isinstance(events[-1] if events else None, ConnectionFailed):
            break
    assert connection.is_broken
    assert stream_id < 2_000


def test_a_reset_stream_counts_until_its_handler_has_ended() -> None:
    connection = connected(Bounds(1_000, 1))
    assert len(connection.feed(call(1) + frame(frames.RST_STREAM, 0, 1, bytes(4)), now_us=0)) == 2
    assert connection.feed(call(3), now_us=0) == []
    assert parsed(output_of(connection))[-1][:3] == (frames.RST_STREAM, 0, 3)
    connection.handler_ended(1)
    assert [type(event) for event in connection.feed(call(5), now_us=0)] == [RequestReceived]


def test_a_header_block_in_tiny_fragments_or_without_end_ends_the_connection() -> None:
    for fragment in (b"", b"x" * 1_000):
        connection = connected()
        fragments = frame(frames.CONTINUATION, 0, 1, fragment) * (CONTINUATIONS_MAX + 1)
        event = connection.feed(headers(1, b"", flags=0) + fragments, now_us=0)[-1]
        assert isinstance(event, ConnectionFailed)
        assert event.error_code is ErrorCode.ENHANCE_YOUR_CALM


def test_headers_at_the_limit_are_accepted_and_one_byte_more_is_not() -> None:
    base = sum(len(name) + len(value) + 32 for name, value in _fields().items())
    size_max = LIST_BYTES_MAX - base - 32 - len("a")
    assert size_max < BLOCK_BYTES_MAX
    for size, kind in ((size_max, RequestReceived), (size_max + 1, ConnectionFailed)):
        connection = connected()
        fields = REQUEST_FIELDS + encode_field("a", "x" * size)
        pieces = headers(1, fields[:10_000], flags=0) + frame(
            frames.CONTINUATION, frames.END_HEADERS, 1, fields[10_000:]
        )
        event = connection.feed(pieces + frame(frames.DATA, frames.END_STREAM, 1, framed(b"")), now_us=0)[-1]
        assert type(event) is kind


def _fields() -> dict[str, str]:
    return {":method": "POST", ":scheme": "http", ":path": "/a/B", "content-type": "application/grpc"}


def test_flow_control_windows_reopen_while_a_message_arrives() -> None:
    connection = connected(Bounds(10**7, 8))
    sent = {0: CONNECTION_WINDOW, 1: STREAM_WINDOW}
    message = framed(b"x" * 3_000_000)
    events = connection.feed(headers(1), now_us=0)
    for start in range(0, len(message), 16_384):
        piece = message[start : start + 16_384]
        flags = frames.END_STREAM if start + 16_384 >= len(message) else 0
        for window in sent:
            sent[window] -= len(piece)
            assert sent[window] >= 0, "a peer that keeps to its window waits for ever"
        events += connection.feed(frame(frames.DATA, flags, 1, piece), now_us=0)
        for kind, _, stream_id, payload in parsed(output_of(connection)):
            assert kind == frames.WINDOW_UPDATE
            sent[stream_id] += frames.WORD.unpack(payload)[0]
    assert [event.message for event in events if isinstance(event, RequestReceived)] == [b"x" * 3_000_000]
    assert sent[0] <= CONNECTION_WINDOW
    assert sent[1] <= STREAM_WINDOW


def test_a_cached_header_block_is_invalidated_when_the_dynamic_table_changes() -> None:
    connection = connected()
    newest = REQUEST_FIELDS + b"\xbe"
    values = []
    for stream_id, fields in enumerate(
        (REQUEST_FIELDS + b"\x40\x01x\x01a", newest, newest, REQUEST_FIELDS + b"\x40\x01x\x01b", newest)
    ):
        (event,) = connection.feed(
            headers(2 * stream_id + 1, fields) + frame(frames.DATA, frames.END_STREAM, 2 * stream_id + 1, framed(b"")),
            now_us=0,
        )
        assert isinstance(event, RequestReceived)
        values.append(event.headers["x"])
    assert values == ["a", "a", "a", "b", "b"]


def test_a_call_ends_once() -> None:
    connection = connected()
    connection.feed(frames.settings({frames.INITIAL_WINDOW_SIZE: 3}) + call(1), now_us=0)
    connection.send_response(1, b"abcdef")
    connection.end_call(1, Code.DEADLINE_EXCEEDED, "too late to say so")
    connection.feed(frames.window_update(1, 100), now_us=0)
    last = parsed(output_of(connection))[-1]
    assert last[1] == frames.END_HEADERS | frames.END_STREAM
    assert encode_field("grpc-status", "0") in last[3]


# -- what is wrong with one call only


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({":method": "GET"}, "415"),
        ({"content-type": "application/json"}, "415"),
        ({"content-type": ""}, "415"),
    ],
)
def test_a_request_that_is_not_grpc_is_refused_and_the_connection_stays_open(
    fields: dict[str, str], status: str
) -> None:
    connection = connected()
    assert connection.feed(headers(1, encode_block(_fields() | fields)), now_us=0) == []
    written = parsed(output_of(connection))
    assert written[0][:3] == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1)
    assert status.encode() in written[0][3]
    assert [type(event) for event in connection.feed(call(3), now_us=0)] == [RequestReceived]


@pytest.mark.parametrize(
    "fields",
    [
        b"",
        encode_block({":method": "POST", ":scheme": "http"}),
        REQUEST_FIELDS + encode_field("Upper", "x"),
        REQUEST_FIELDS + encode_field(":path", "/again"),
        REQUEST_FIELDS + encode_field("connection", "close"),
        REQUEST_FIELDS + encode_field("x", "a\nb"),
        REQUEST_FIELDS + encode_field(":status", "200"),
        encode_field("x", "y") + REQUEST_FIELDS,
    ],
)
def test_invalid_request_headers_reset_their_stream(fields: bytes) -> None:
    connection = connected()
    assert connection.feed(headers(1, fields), now_us=0) == []
    assert parsed(output_of(connection)) == [(frames.RST_STREAM, 0, 1, frames.WORD.pack(ErrorCode.PROTOCOL_ERROR))]
    assert [type(event) for event in connection.feed(call(3), now_us=0)] == [RequestReceived]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", Code.INTERNAL),
        (b"\0\0\0", Code.INTERNAL),
        (framed(b"hello")[:-1], Code.INTERNAL),
        (framed(b"hello", flag=2), Code.INTERNAL),
        (framed(b"hello") + b"x", Code.UNIMPLEMENTED),
        (framed(b"hello") * 2, Code.UNIMPLEMENTED),
        (framed(b"x" * BOUNDS.message_bytes_max)[:4] + b"\xff", Code.RESOURCE_EXHAUSTED),
        (b"\0" + struct.pack(">I", BOUNDS.message_bytes_max + 1), Code.RESOURCE_EXHAUSTED),
    ],
)
def test_a_call_without_exactly_one_complete_message_is_refused(body: bytes, code: Code) -> None:
    connection = connected()
    assert connection.feed(headers(1) + frame(frames.DATA, frames.END_STREAM, 1, body), now_us=0) == []
    kind, flags, _, payload = parsed(output_of(connection))[0]
    assert (kind, flags) == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM)
    assert encode_field("grpc-status", str(int(code))) in payload
    assert connection.streams_count == 0


def test_data_in_flight_for_a_refused_call_is_ignored() -> None:
    connection = connected()
    start = frame(frames.DATA, 0, 1, b"\0" + struct.pack(">I", 10**9))
    assert connection.feed(headers(1) + start + frame(frames.DATA, 0, 1, b"x" * 16_000) * 200, now_us=0) == []
    assert not connection.is_broken
    written = [written_frame[:3] for written_frame in parsed(output_of(connection))]
    assert written[:2] == [(frames.HEADERS, 5, 1), (frames.RST_STREAM, 0, 1)]
    assert written.count((frames.WINDOW_UPDATE, 0, 0)) == 200 * 16_000 // (CONNECTION_WINDOW // 2)


def test_calls_beyond_the_limit_are_refused_as_safe_to_retry() -> None:
    connection = connected(Bounds(1_000, 2))
    events = connection.feed(call(1) + call(3) + call(5), now_us=0)
    assert [event.stream_id for event in events if isinstance(event, RequestReceived)] == [1, 3]
    assert parsed(output_of(connection)) == [(frames.RST_STREAM, 0, 5, frames.WORD.pack(ErrorCode.REFUSED_STREAM))]


def test_after_goaway_no_new_call_is_accepted_and_open_ones_complete() -> None:
    connection = connected()
    connection.feed(call(1), now_us=0)
    connection.go_away()
    connection.go_away()
    assert connection.feed(call(3), now_us=0) == []
    connection.send_response(1, b"done")
    written = parsed(output_of(connection))
    assert [written_frame[0] for written_frame in written] == [
        frames.GOAWAY,
        frames.RST_STREAM,
        frames.HEADERS,
        frames.DATA,
        frames.HEADERS,
    ]
    assert written[0][3][:8] == struct.pack(">II", 1, 0)


def test_a_call_whose_message_arrives_slowly_is_reported() -> None:
    connection = connected()
    connection.feed(headers(1) + call(3) + headers(5), now_us=0)
    assert connection.slow_calls(10) == [], "a call has one interval to begin"
    connection.feed(
        frame(frames.DATA, 0, 1, framed(b"x" * 99)[:9]) + frame(frames.DATA, 0, 5, framed(b"x" * 20)[:10]), now_us=0
    )
    assert connection.slow_calls(10) == [1], "nine bytes in an interval are less than ten"


def test_a_response_waits_for_the_peer_s_window() -> None:
    connection = connected()
    connection.feed(frames.settings({frames.INITIAL_WINDOW_SIZE: 3}) + call(1), now_us=0)
    connection.take_output()
    connection.send_response(1, b"abcdef")
    assert [written_frame[3] for written_frame in parsed(output_of(connection))][1:] == [framed(b"abcdef")[:3]]
    assert connection.pending_bytes == 8
    connection.feed(frames.window_update(1, 7), now_us=0)
    assert [written_frame[3] for written_frame in parsed(output_of(connection))] == [framed(b"abcdef")[3:10]]
    connection.feed(frames.settings({frames.INITIAL_WINDOW_SIZE: 4}), now_us=0)
    rest = parsed(output_of(connection))
    assert rest[1][:2] == (frames.DATA, 0)
    assert rest[1][3] == framed(b"abcdef")[10:]
    assert rest[2][:2] == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM)
    assert (connection.pending_bytes, connection.streams_count) == (0, 0)


SIGNED = encode_field("sentry-signature", "ab" * 32)


@pytest.mark.parametrize(
    ("fields", "signature"),
    [
        (REQUEST_FIELDS + SIGNED, "ab" * 32),
        (REQUEST_FIELDS + encode_field("sentry-signature", "cd" * 32) + SIGNED, "ab" * 32),
        (REQUEST_FIELDS + encode_field("sentry-signature", "ab" * 32, is_secret=True), "ab" * 32),
        (REQUEST_FIELDS + encode_field("sentry-signature", "a" * 63), "a" * 63),
        (REQUEST_FIELDS + encode_field("sentry-signature", "a" * 63 + "-"), "a" * 63 + "-"),
        (SIGNED + REQUEST_FIELDS, "none"),
        (SIGNED, "none"),
        (REQUEST_FIELDS + encode_field("x", "y" * 10 + SIGNED.decode("latin-1")), "broken"),
        (REQUEST_FIELDS + b"\x40\x01x\x03abc" + SIGNED, "ab" * 32),
        (REQUEST_FIELDS + b"\x20" + SIGNED, "broken"),
    ],
)
def test_a_signature_is_decoded_at_any_position_in_the_headers(fields: bytes, signature: str) -> None:
    for _ in range(2):
        connection = connected()
        for stream_id in (1, 3):
            body = frame(frames.DATA, frames.END_STREAM, stream_id, framed(b""))
            events = connection.feed(headers(stream_id, fields) + body, now_us=0)
            if signature in ("none", "broken"):
                assert not any(
                    isinstance(event, RequestReceived) and "sentry-signature" in event.headers for event in events
                )
                assert connection.is_broken == (signature == "broken")
            else:
                (event,) = events
                assert isinstance(event, RequestReceived)
                assert event.headers["sentry-signature"] == signature
                assert event.headers[":path"] == "/a/B"


# -- both ends

SIZES = st.lists(st.sampled_from([0, 1, 5_000, 16_384 - 5, 16_384, 70_000, 300_000]), min_size=1, max_size=6)


@given(SIZES, SIZES, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_client_and_server_exchange_all_messages_however_bytes_are_split(
    asks: list[int], answers: list[int], random: Random
) -> None:
    budget, bounds = Budget(10**8), Bounds(10**6, 100)
    ends = client, other = Http2Connection(bounds, budget, is_client=True), Http2Connection(bounds, budget)
    buffers: list[bytes] = [b"", b""]
    sent = [client.start_call(REQUEST_FIELDS, bytes([number]) * size) for number, size in enumerate(asks)]
    responses: dict[int, bytes | None] = {}
    received: dict[int, bytes] = {}
    expected: dict[int, bytes] = {}
    while len(responses) < len(sent):
        for number, end in enumerate(ends):
            buffers[number] += output_of(end)
            size = random.choice((1, 9, 700, 40_000, 1_000_000))
            piece, buffers[number] = buffers[number][:size], buffers[number][size:]
            for event in ends[1 - number].feed(piece, now_us=0):
                if isinstance(event, RequestReceived):
                    received[event.stream_id] = event.message
                    expected[event.stream_id] = b"a" * answers[len(received) % len(answers)]
                    other.send_response(event.stream_id, expected[event.stream_id])
                elif isinstance(event, ResponseReceived):
                    assert event.trailers["grpc-status"] == "0"
                    responses[event.stream_id] = event.message
                else:
                    pytest.fail(str(event))
    assert [received[stream_id] for stream_id in sent] == [bytes([n]) * size for n, size in enumerate(asks)]
    assert responses == expected
    assert (budget.held_bytes, client.streams_count, other.streams_count) == (0, 0, 0)


def test_a_client_receives_the_status_of_a_failed_call() -> None:
    client, other = Http2Connection(BOUNDS, Budget(10**6), is_client=True), new_server()
    stream_id = client.start_call(REQUEST_FIELDS, b"hello")
    other.feed(output_of(client), now_us=0)
    other.end_call(stream_id, Code.NOT_FOUND, "50 % gone")
    (event,) = client.feed(output_of(other), now_us=0)
    assert isinstance(event, ResponseReceived)
    assert (event.message, event.trailers["grpc-status"]) == (None, "5")
    assert decode_status_message(event.trailers["grpc-message"]) == "50 % gone"


def test_a_client_refuses_a_response_over_its_limit() -> None:
    client, other = Http2Connection(Bounds(10, 1), Budget(10**6), is_client=True), new_server()
    stream_id = client.start_call(REQUEST_FIELDS, b"hello")
    other.feed(output_of(client), now_us=0)
    other.send_response(stream_id, b"x" * 11)
    events = client.feed(output_of(other), now_us=0)
    assert [event.trailers["grpc-status"] for event in events if isinstance(event, ResponseReceived)] == ["8"]
    assert client.streams_count == 0
