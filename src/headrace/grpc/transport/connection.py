"""One HTTP/2 connection that carries gRPC, as a state machine: bytes in, events out, and bytes to write back.

Rule 1: no socket, no event loop, no clock. `feed` never blocks and never raises, for any input.
Rule 2: everything a peer can make grow is bounded here: headers, messages, streams, the bytes held by all connections
together (`Budget`), and an allowance for frames that carry no call. Control frames, resets and tiny frames spend it;
time and completed calls refill it.

Both ends, client and server, with unary calls and streaming responses. A protocol violation ends the connection with
GOAWAY; an error of one stream ends that stream only.
"""

from __future__ import annotations

from typing import ClassVar, Final

from headrace.grpc.transport import frames
from headrace.grpc.transport.bounds import Bounds
from headrace.grpc.transport.budget import Allotment, Budget
from headrace.grpc.transport.events import (
    ConnectionFailed,
    Event,
    GoAwayReceived,
    RequestReceived,
    ResponseReceived,
    StreamReset,
)
from headrace.grpc.transport.frames import FRAME_BYTES, ErrorCode, ProtocolError
from headrace.grpc.transport.headers import (
    BLOCK_BYTES_MAX,
    LIST_BYTES_MAX,
    HeaderReader,
    Headers,
    encode_field,
    encode_status_message,
)
from headrace.grpc.transport.sender import (
    ALLOWANCE_MAX,
    CONTENT_TYPE,
    PREFIX_BYTES,
    STREAM_WINDOW,
    TAKE_BYTES,
    CallStream,
    Sender,
)
from headrace.grpc.transport.settings import decode_settings
from headrace.grpc.transport.status import Code

CONNECTION_WINDOW: Final = 1024 * 1024
"""Bytes a peer may send on all streams before a WINDOW_UPDATE. The window reopens as bytes arrive."""

CALLS_BEFORE_SETTINGS: Final = 100
"""Concurrent calls a client allows itself until the server's SETTINGS have arrived."""

ALLOWANCE_PER_S: Final = 100
RESET_COST: Final = 4
SETTINGS_COST: Final = 4
CALL_COST: Final = 4
"""Cost of a call that reaches no handler."""
SETTINGS_A_UNIT: Final = 8
STREAMS_A_UNIT: Final = 16
HEADER_BYTES_A_UNIT: Final = 256
HEADER_BYTES_FREE: Final = 512
"""Header blocks of at most this size cost nothing beyond their call."""
STEP_UNITS: Final = 64
"""Work of one `step`: a frame is one unit, and a header block that must be decoded one for each 256 bytes."""
CONTINUATIONS_MAX: Final = 32
TINY_BYTES: Final = 64
CONTENT_LENGTH_DIGITS: Final = 20
PSEUDO: Final = frozenset((":method", ":scheme", ":path", ":authority", ":status"))
_NOT_GRPC: Final = (
    encode_field(":status", "415") + encode_field("grpc-status", "12") + encode_field("accept", CONTENT_TYPE)
)


class Http2Connection(Sender):
    """One end of a connection. `peer_calls_max` is the number of concurrent calls that the peer allows."""

    def __init__(self, bounds: Bounds, budget: Budget, *, is_client: bool = False) -> None:
        super().__init__(Allotment(budget, bounds.message_bytes_max + PREFIX_BYTES), is_client=is_client)
        self.bounds = bounds
        self.is_broken = False
        self.is_peer_leaving = False
        self.pings_acknowledged_count = 0
        self.peer_calls_max = CALLS_BEFORE_SETTINGS
        self._reader = HeaderReader()
        self._events: list[Event] = []
        self.has_more = False
        self._unparsed = b""
        self._place = 0
        self._units = 0
        self._preface_rest = b"" if is_client else frames.PREFACE
        self._has_peer_settings = False
        self._open_block: tuple[int, int, bytearray] | None = None
        self._continuations_count = 0
        self._receive_window = CONNECTION_WINDOW
        if is_client:
            self._write(frames.PREFACE)
        self._write(
            frames.settings(
                {
                    frames.ENABLE_PUSH: 0,
                    frames.MAX_CONCURRENT_STREAMS: bounds.calls_max,
                    frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                    frames.MAX_HEADER_LIST_SIZE: LIST_BYTES_MAX,
                }
                if not is_client
                else {frames.ENABLE_PUSH: 0, frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW}
            )
        )
        self._write(frames.window_update(0, CONNECTION_WINDOW - frames.WINDOW_FIRST))

    # -- receiving bytes

    def feed(self, data: bytes, *, now_us: int) -> list[Event]:
        """Process received bytes to their end and return the events. After `ConnectionFailed` there are none."""
        self.receive(data)
        events = self.step(now_us=now_us)
        while self.has_more:
            events += self.step(now_us=now_us)
        return events

    def receive(self, data: bytes) -> None:
        """Add received bytes to those that `step` has not processed."""
        rest = self._unparsed[self._place :] if self._place else self._unparsed
        self._unparsed, self._place, self.has_more = rest + data if rest else data, 0, True

    def step(self, *, now_us: int) -> list[Event]:
        """Process the next frames, about `STEP_UNITS` of work, and return their events.

        `has_more` says if frames may be left. After `ConnectionFailed` there are no events.
        """
        events: list[Event] = []
        self.has_more = False
        if self.is_broken:
            return events
        self._events = events
        paid = (now_us - self._paid_us) * ALLOWANCE_PER_S // 1_000_000
        if paid > 0:
            self._allowance, self._paid_us = min(ALLOWANCE_MAX, self._allowance + paid), now_us
        try:
            self._parse()
        except ProtocolError as broken:
            self.close()
            self.has_more = False
            self._write(frames.goaway(self.last_id, broken.error_code, broken.reason))
            events.append(ConnectionFailed(broken.error_code, broken.reason))
        return events

    def _parse(self) -> None:
        if self._preface_rest:
            self._unparsed = self._read_preface(self._unparsed[self._place :])
            self._place = 0
        data, place, end = self._unparsed, self._place, len(self._unparsed)
        unpack, on_frame = frames.HEAD.unpack_from, self._FRAMES
        self._units = STEP_UNITS
        self._spend_allowance(0)  # calls may have been charged since the last step
        while end - place >= frames.HEAD_BYTES:
            high, low, kind, flags, stream_id = unpack(data, place)
            length = high << 8 | low
            if length > FRAME_BYTES:
                raise ProtocolError(
                    ErrorCode.FRAME_SIZE_ERROR, f"expected a frame of at most {FRAME_BYTES} bytes, got {length}"
                )
            stop = place + frames.HEAD_BYTES + length
            if stop > end:
                break
            if self._units <= 0:
                self.has_more = True
                break
            self._units -= 1
            payload = data[place + frames.HEAD_BYTES : stop]
            place = stop
            if self._open_block is not None and kind != frames.CONTINUATION:
                raise ProtocolError(
                    ErrorCode.PROTOCOL_ERROR, f"expected CONTINUATION within a header block, got a frame of kind {kind}"
                )
            if not self._has_peer_settings and (kind != frames.SETTINGS or flags & frames.ACK):
                raise ProtocolError(
                    ErrorCode.PROTOCOL_ERROR,
                    f"expected SETTINGS as the first frame, got a frame of kind {kind} with flags {flags:#x}",
                )
            if kind < len(on_frame):
                on_frame[kind](self, flags, stream_id & 0x7FFFFFFF, payload)
            else:
                self._spend_allowance(1)
        if place == end:
            self._unparsed, self._place = b"", 0
        else:
            self._place = place

    def _read_preface(self, data: bytes) -> bytes:
        expected_bytes = self._preface_rest
        received_bytes = data[: len(expected_bytes)]
        if not expected_bytes.startswith(received_bytes):
            raise ProtocolError(
                ErrorCode.PROTOCOL_ERROR, f"expected the HTTP/2 connection preface, got {received_bytes[:24]!r}"
            )
        self._preface_rest = expected_bytes[len(received_bytes) :]
        return data[len(received_bytes) :]

    def _spend_allowance(self, cost: int) -> None:
        self._allowance -= cost
        if self._allowance < 0:
            raise ProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM,
                "expected frames that carry calls, got too many control frames, resets or tiny frames",
            )

    # -- frames of calls

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._receive_window -= size
        if self._receive_window <= CONNECTION_WINDOW // 2:
            self._write(frames.window_update(0, CONNECTION_WINDOW - self._receive_window))
            self._receive_window = CONNECTION_WINDOW
        stream = self._streams.get(stream_id)
        if stream is None or stream.is_received:
            self._check_opened(stream_id, "DATA")
            if stream is not None or stream_id in self._ended_by_peer:
                raise ProtocolError(
                    ErrorCode.STREAM_CLOSED,
                    f"expected no DATA after the end of stream {stream_id}, got a frame of {size} bytes",
                )
            self._spend_allowance(1)
            return
        stream.receive_window -= size
        if flags & frames.PADDED:
            payload = frames.strip_padding(payload, flags)
        if len(payload) < TINY_BYTES and not flags & frames.END_STREAM:
            self._spend_allowance(1)
        if self._add_to_message(stream, payload):
            if flags & frames.END_STREAM:
                self._on_stream_received(stream)
            elif stream.receive_window <= STREAM_WINDOW // 2:
                self._write(frames.window_update(stream_id, STREAM_WINDOW - stream.receive_window))
                stream.receive_window = STREAM_WINDOW

    def _add_to_message(self, stream: CallStream, payload: bytes) -> bool:
        """Add to a stream's message. Returns False if that ended the stream."""
        is_exceeded = self.allotment.hold(len(payload))
        if not stream.body:
            stream.body = payload
        elif isinstance(stream.body, bytearray):
            stream.body += payload
        else:
            stream.body = bytearray(stream.body) + payload
        if is_exceeded:
            return self._refuse(stream, Code.RESOURCE_EXHAUSTED, f"{self.allotment.excess}; retry later")
        held = len(stream.body)
        if stream.expected < 0 and held >= PREFIX_BYTES:
            stream.expected = int.from_bytes(stream.body[1:PREFIX_BYTES], "big")
            if stream.expected > self.bounds.free_bytes and stream.expected > (
                bytes_max := self.bounds.of_message(stream.headers)
            ):
                reason = f"expected a message of at most {bytes_max} bytes, got {stream.expected}"
                return self._refuse(stream, Code.RESOURCE_EXHAUSTED, reason)
        if stream.expected >= 0 and held > PREFIX_BYTES + stream.expected:
            return self._refuse(stream, Code.UNIMPLEMENTED, "expected a single message, got more bytes after it")
        return True

    def _refuse(self, stream: CallStream, code: Code, reason: str) -> bool:
        """End a stream from this side. A server sends the status; a client reports it to its caller."""
        if self.is_client:
            trailers = {"grpc-status": str(int(code)), "grpc-message": encode_status_message(reason)}
            self._events.append(ResponseReceived(stream.id, stream.headers or {}, trailers, None, is_compressed=False))
            self.reset_stream(stream.id, ErrorCode.CANCEL)
        else:
            self.refuse_call(stream.id, code, reason)
        return False

    def charge_call(self) -> None:
        """Charge the peer for a call that reached no handler. The next frames find out if that was too much."""
        self._allowance -= CALL_COST

    def refuse_call(self, stream_id: int, code: Code, reason: str) -> None:
        """End a call that reaches no handler, and charge its peer."""
        self.end_call(stream_id, code, reason)
        self._spend_allowance(CALL_COST)

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "expected HEADERS on a stream, got stream 0")
        block = frames.strip_padding(payload, flags)
        if flags & frames.WITH_PRIORITY:
            if len(block) < 5:
                raise ProtocolError(
                    ErrorCode.FRAME_SIZE_ERROR,
                    f"expected 5 bytes of priority at the start of HEADERS, got {len(block)}",
                )
            block = block[5:]
        if flags & frames.END_HEADERS:
            self._on_header_block(flags, stream_id, block)
        else:
            self._open_block, self._continuations_count = (flags, stream_id, bytearray(block)), 0

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._open_block is None or self._open_block[1] != stream_id:
            raise ProtocolError(
                ErrorCode.PROTOCOL_ERROR,
                f"expected no CONTINUATION without an unfinished header block, got one on stream {stream_id}",
            )
        first_flags, _, block = self._open_block
        block += payload
        self._continuations_count += 1
        if len(block) > BLOCK_BYTES_MAX or self._continuations_count > CONTINUATIONS_MAX:
            raise ProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM,
                (
                    f"expected a header block of at most {BLOCK_BYTES_MAX} bytes in at most {CONTINUATIONS_MAX} "
                    "CONTINUATION frames, "
                    f"got {len(block)} bytes in {self._continuations_count}"
                ),
            )
        if flags & frames.END_HEADERS:
            self._open_block = None
            self._on_header_block(first_flags, stream_id, bytes(block))

    def _on_header_block(self, flags: int, stream_id: int, block: bytes) -> None:
        headers = self._reader.read(block)
        if self._reader.decoded_bytes > HEADER_BYTES_FREE:
            cost = self._reader.decoded_bytes // HEADER_BYTES_A_UNIT
            self._units -= cost
            self._spend_allowance(cost)
        stream = self._streams.get(stream_id)
        if stream is None:
            if self.is_client:
                self._check_opened(stream_id, "HEADERS")
                self._check_not_ended(stream_id, "HEADERS")
                self._spend_allowance(1)
                return
            stream = self._open_stream(stream_id, headers)
            if stream is None:
                return
        elif stream.is_received:
            raise ProtocolError(ErrorCode.STREAM_CLOSED, f"expected no HEADERS after the end of stream {stream_id}")
        elif not self._on_further_headers(stream, headers, is_end=bool(flags & frames.END_STREAM)):
            return
        if flags & frames.END_STREAM:
            self._on_stream_received(stream)

    def _on_further_headers(self, stream: CallStream, headers: Headers | None, *, is_end: bool) -> bool:
        """Process the headers of a response, or trailers. Returns False if that ended the stream."""
        if headers is None:
            self._end_violating_stream(stream, "the headers of the response are invalid")
            return False
        if self.is_client and stream.headers is None:
            if headers.get(":status", "").startswith("1"):
                self._spend_allowance(1)
                return False
            stream.headers = headers
            if is_end:
                stream.trailers = headers
            return True
        if not is_end or not headers.keys().isdisjoint(PSEUDO):
            self._end_violating_stream(stream, "expected trailers without pseudo-headers, which end their stream")
            return False
        stream.trailers = headers
        return True

    def _end_violating_stream(
        self, stream: CallStream, reason: str, code: ErrorCode = ErrorCode.PROTOCOL_ERROR
    ) -> None:
        """End a stream on which the peer broke the protocol."""
        self._spend_allowance(RESET_COST)
        if self.is_client:
            self._refuse(stream, Code.INTERNAL, reason)
        else:
            self._events.append(StreamReset(stream.id, code))
            self._abandoned.add(stream.id)
            self.reset_stream(stream.id, code)

    def _open_stream(self, stream_id: int, headers: Headers | None) -> CallStream | None:
        if not stream_id & 1:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"expected an odd stream id from a client, got {stream_id}")
        if stream_id <= self.last_id:
            self._check_not_ended(stream_id, "HEADERS")
            if stream_id not in self._ended_here:
                raise ProtocolError(
                    ErrorCode.PROTOCOL_ERROR, f"expected a stream id above {self.last_id}, got HEADERS on {stream_id}"
                )
            self._spend_allowance(1)  # the peer may have sent it before it learned that the stream ended
            return None
        self.last_id = stream_id
        if headers is None or not {":method", ":path", ":scheme"} <= headers.keys() or ":status" in headers:
            self._spend_allowance(RESET_COST)
            self._write(frames.rst_stream(stream_id, ErrorCode.PROTOCOL_ERROR))
            return None
        if self.is_leaving or len(self._streams) + len(self._abandoned) >= self.bounds.calls_max:
            self._spend_allowance(1)
            self._write(frames.rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            return None
        stream = self._streams[stream_id] = CallStream(stream_id, self._stream_window)
        stream.headers = headers
        if headers[":method"] != "POST" or not headers.get("content-type", "").startswith(CONTENT_TYPE):
            self._end(stream, _NOT_GRPC)
            self._spend_allowance(CALL_COST)
            return None
        return stream

    def _on_stream_received(self, stream: CallStream) -> None:
        stream.is_received = True
        if not self.is_client and stream.headers is not None and "content-length" in stream.headers:
            expected = int(stream.headers["content-length"][:CONTENT_LENGTH_DIGITS])
            if expected != len(stream.body):
                self._end_violating_stream(stream, "expected as many bytes as content-length says")
                return
        is_whole = stream.expected >= 0 and len(stream.body) == PREFIX_BYTES + stream.expected
        if self.is_client:
            self._on_response_received(stream, is_whole=is_whole)
        elif not is_whole:
            self.refuse_call(stream.id, Code.INTERNAL, "expected one complete message, got less")
        elif stream.body[0] > 1:
            self.refuse_call(
                stream.id,
                Code.INTERNAL,
                f"expected a compressed flag of 0 or 1 before the message, got {stream.body[0]}",
            )
        else:
            assert stream.headers is not None
            message = bytes(stream.body[PREFIX_BYTES:])
            self._events.append(RequestReceived(stream.id, stream.headers, message, bool(stream.body[0])))

    def _on_response_received(self, stream: CallStream, *, is_whole: bool) -> None:
        if stream.headers is None or (stream.body and not is_whole):
            self._refuse(stream, Code.INTERNAL, "the response ended in the middle of a message")
            return
        self.credit_call()
        trailers = stream.trailers if stream.trailers is not None else {}
        message = bytes(stream.body[PREFIX_BYTES:]) if is_whole else None
        self._events.append(
            ResponseReceived(stream.id, stream.headers, trailers, message, bool(stream.body[:1] == b"\x01"))
        )
        if not stream.is_sent:
            self._write(frames.rst_stream(stream.id, ErrorCode.CANCEL))
        self._remove_stream(stream)

    # -- frames of the connection

    def _on_priority(self, _flags: int, stream_id: int, payload: bytes) -> None:
        self._spend_allowance(1)
        if not stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "expected PRIORITY on a stream, got stream 0")
        if len(payload) != 5:
            stream = self._streams.get(stream_id)
            if stream is not None:
                self._end_violating_stream(stream, "expected 5 bytes in PRIORITY", ErrorCode.FRAME_SIZE_ERROR)
                return
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"expected 5 bytes in PRIORITY, got {len(payload)}")

    def _on_reset(self, _flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"expected 4 bytes in RST_STREAM, got {len(payload)}")
        self._check_opened(stream_id, "RST_STREAM")
        self._spend_allowance(RESET_COST)
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if stream.is_received and not self.is_client:
            self._abandoned.add(stream_id)  # its handler still runs, and counts as open until it ends
        stream.is_received = True
        self._remove_stream(stream)
        self._events.append(StreamReset(stream_id, frames.WORD.unpack(payload)[0]))

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._spend_allowance(SETTINGS_COST)
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"expected SETTINGS on stream 0, got stream {stream_id}")
        if flags & frames.ACK:
            if payload:
                raise ProtocolError(
                    ErrorCode.FRAME_SIZE_ERROR, f"expected an empty SETTINGS acknowledgement, got {len(payload)} bytes"
                )
            return
        self._has_peer_settings = True
        self._spend_allowance(
            len(payload) // frames.SETTING.size // SETTINGS_A_UNIT + len(self._streams) // STREAMS_A_UNIT
        )
        values, window_max = decode_settings(payload, is_from_server=self.is_client)
        self._apply_settings(values, window_max)
        self._write(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _apply_settings(self, values: dict[int, int], window_max: int) -> None:
        """Apply the last value of each setting. `window_max`: the largest initial window among all values, which must
        not overflow the window of any stream.
        """
        self._frame_max = min(values.get(frames.MAX_FRAME_SIZE, self._frame_max), TAKE_BYTES)
        self.peer_calls_max = values.get(frames.MAX_CONCURRENT_STREAMS, self.peer_calls_max)
        if frames.INITIAL_WINDOW_SIZE not in values:
            return
        largest = max((stream.window for stream in self._streams.values()), default=0)
        if self._streams and largest + window_max - self._stream_window > frames.WINDOW_MAX:
            raise ProtocolError(
                ErrorCode.FLOW_CONTROL_ERROR,
                f"expected a window of at most 2^31-1 bytes, got {largest + window_max - self._stream_window}",
            )
        change = values[frames.INITIAL_WINDOW_SIZE] - self._stream_window
        self._stream_window += change
        for stream in self._streams.values():
            stream.window += change

    def _on_push_promise(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "expected no PUSH_PROMISE: push is disabled")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, f"expected PING on stream 0, got stream {stream_id}")
        if len(payload) != 8:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"expected 8 bytes in PING, got {len(payload)}")
        self._spend_allowance(1)
        if flags & frames.ACK:
            self.pings_acknowledged_count += 1
        else:
            self._write(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _on_goaway(self, _flags: int, stream_id: int, payload: bytes) -> None:
        self._spend_allowance(SETTINGS_COST)
        if stream_id or len(payload) < 8:
            raise ProtocolError(
                ErrorCode.PROTOCOL_ERROR if stream_id else ErrorCode.FRAME_SIZE_ERROR,
                f"expected GOAWAY of at least 8 bytes on stream 0, got {len(payload)} bytes on stream {stream_id}",
            )
        last_id, error_code = (word for (word,) in frames.WORD.iter_unpack(payload[:8]))
        self.is_peer_leaving = True
        self._events.append(GoAwayReceived(last_id & 0x7FFFFFFF, error_code))

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, f"expected 4 bytes in WINDOW_UPDATE, got {len(payload)}")
        self._spend_allowance(1)
        increment = frames.WORD.unpack(payload)[0] & 0x7FFFFFFF
        if not stream_id:
            self._window += increment
            if not increment or self._window > frames.WINDOW_MAX:
                raise ProtocolError(
                    ErrorCode.FLOW_CONTROL_ERROR if increment else ErrorCode.PROTOCOL_ERROR,
                    f"expected a window of 1 to 2^31-1 bytes, got {self._window} after adding {increment}",
                )
            return
        self._check_opened(stream_id, "WINDOW_UPDATE")
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.window += increment
            if not increment or stream.window > frames.WINDOW_MAX:
                code = ErrorCode.FLOW_CONTROL_ERROR if increment else ErrorCode.PROTOCOL_ERROR
                self._end_violating_stream(stream, f"expected a window of 1 to 2^31-1 bytes, got {stream.window}", code)

    def _check_opened(self, stream_id: int, received: str) -> None:
        """Raise `ProtocolError` for a stream that was never opened."""
        newest = self._next_id - 2 if self.is_client else self.last_id
        if not stream_id & 1 or stream_id > newest:
            raise ProtocolError(
                ErrorCode.PROTOCOL_ERROR,
                f"expected {received} on an opened stream, got stream {stream_id}, which was never opened",
            )

    def _check_not_ended(self, stream_id: int, received: str) -> None:
        """Raise `ProtocolError` for a stream that the peer has ended itself."""
        if stream_id in self._ended_by_peer:
            raise ProtocolError(
                ErrorCode.STREAM_CLOSED, f"expected no {received} after the end of stream {stream_id}, got some"
            )

    def slow_calls(self, bytes_min: int) -> list[int]:
        """Return the ids of calls whose message is incomplete and that received less than `bytes_min` since the last
        call of this method.
        """
        slow_ids = []
        for stream in self._streams.values():
            if not stream.is_received:
                if stream.checked_bytes >= 0 and len(stream.body) - stream.checked_bytes < bytes_min:
                    slow_ids.append(stream.id)
                stream.checked_bytes = len(stream.body)
        return slow_ids

    def close(self) -> list[int]:
        """End the connection. Returns the ids of the calls that were open."""
        self.is_broken = True
        open_ids = list(self._streams)
        for stream in tuple(self._streams.values()):
            self._remove_stream(stream)
        return open_ids

    _FRAMES: ClassVar = (
        _on_data,
        _on_headers,
        _on_priority,
        _on_reset,
        _on_settings,
        _on_push_promise,
        _on_ping,
        _on_goaway,
        _on_window_update,
        _on_continuation,
    )
