"""One HTTP/2 connection that carries gRPC, as a machine: bytes in, calls out, and what is to be written back.

Rule 1: no socket, no loop, no clock; `feed` never blocks and never raises, whatever it is fed.
Rule 2: everything a peer can make grow has a bound here: headers, messages, streams, what is held for all connections
together (`Budget`), and its patience: control frames, resets and tiny frames cost, time and finished calls pay back.

It knows unary calls and answers of several messages, and both ends of them. A broken protocol ends the connection with
GOAWAY; what is wrong with one stream ends that stream.
"""

from __future__ import annotations

from typing import ClassVar, Final, NamedTuple

from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import FRAME_BYTES, Broken, Fault
from headrace.grpc.transport.headers import BLOCK_BYTES_MAX, LIST_BYTES_MAX, HeaderReader, Headers, literal, percent
from headrace.grpc.transport.sender import (
    CONTENT_TYPE,
    PATIENCE_MAX,
    PREFIX_BYTES,
    STREAM_WINDOW,
    TAKE_BYTES,
    Budget,
    Sender,
    Stream,
)
from headrace.grpc.transport.status import Code

CONNECTION_WINDOW: Final = 1024 * 1024
"""What a peer may send on all its streams before it hears from us; opened again as the bytes come."""

CALLS_BEFORE_SETTINGS: Final = 100
"""What a client allows itself until it heard the server's own bound."""

PATIENCE_PER_S: Final = 100
PATIENCE_PER_CALL: Final = 10
RESET_COST: Final = 4
SETTINGS_COST: Final = 4
CONTINUATIONS_MAX: Final = 32
TINY_BYTES: Final = 64
_NOT_GRPC: Final = literal(":status", "415") + literal("grpc-status", "12") + literal("accept", CONTENT_TYPE)


class Bounds(NamedTuple):
    """What one connection may ask of us. `calls_max`: streams at a time, with those whose handlers have yet to end."""

    message_bytes_max: int
    calls_max: int


class Request(NamedTuple):
    """A call came in whole."""

    stream_id: int
    headers: Headers
    message: bytes
    is_packed: bool


class Answer(NamedTuple):
    """A call of ours was answered. `message` is None where there was none; `trailers` have the status."""

    stream_id: int
    headers: Headers
    trailers: Headers
    message: bytes | None
    is_packed: bool


class Reset(NamedTuple):
    """The peer gave a stream up."""

    stream_id: int
    fault: int


class Away(NamedTuple):
    """The peer takes no streams after `last_id`."""

    last_id: int
    fault: int


class Broke(NamedTuple):
    """The connection is over: the peer broke the protocol, and GOAWAY tells it how."""

    fault: Fault
    what: str


Event = Request | Answer | Reset | Away | Broke


class Machine(Sender):
    """One end of a connection. `calls_max` of the peer is what it allows us."""

    def __init__(self, bounds: Bounds, budget: Budget, *, is_client: bool = False) -> None:
        super().__init__(budget, is_client=is_client)
        self.bounds = bounds
        self.is_broken = False
        self.is_told_away = False
        self.heard_pings_count = 0
        self.peer_calls_max = CALLS_BEFORE_SETTINGS
        self._reader = HeaderReader()
        self._events: list[Event] = []
        self._left = b""
        self._preface_left = b"" if is_client else frames.PREFACE
        self._is_greeted = False
        self._partial: tuple[int, int, bytearray] | None = None
        self._partials_count = 0
        self._credit = CONNECTION_WINDOW
        self._paid_us = 0
        self._now_us = 0
        if is_client:
            self._out.append(frames.PREFACE)
        self._out.append(
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
        self._out.append(frames.window_update(0, CONNECTION_WINDOW - frames.WINDOW_FIRST))

    # -- bytes in

    def feed(self, data: bytes, *, now_us: int) -> list[Event]:
        """What came of some bytes. After a `Broke` there is nothing more."""
        events: list[Event] = []
        if self.is_broken:
            return events
        self._events = events
        self._now_us = now_us
        paid = (now_us - self._paid_us) * PATIENCE_PER_S // 1_000_000
        if paid > 0:
            self._patience, self._paid_us = min(PATIENCE_MAX, self._patience + paid), now_us
        try:
            self._parse(data)
        except Broken as broken:
            self.close()
            self._out.append(frames.goaway(self.last_id, broken.fault, broken.what))
            events.append(Broke(broken.fault, broken.what))
        return events

    def _parse(self, data: bytes) -> None:
        if self._left:
            data = self._left + data
        if self._preface_left:
            data = self._greet(data)
        place, end = 0, len(data)
        unpack, on_frame = frames.HEAD.unpack_from, self._FRAMES
        while end - place >= frames.HEAD_BYTES:
            high, low, kind, flags, stream_id = unpack(data, place)
            length = high << 8 | low
            if length > FRAME_BYTES:
                raise Broken(Fault.FRAME_SIZE_ERROR, f"a frame of {length} bytes; at most {FRAME_BYTES}")
            stop = place + frames.HEAD_BYTES + length
            if stop > end:
                break
            payload = data[place + frames.HEAD_BYTES : stop]
            place = stop
            if self._partial is not None and kind != frames.CONTINUATION:
                raise Broken(Fault.PROTOCOL_ERROR, "a header block is cut by another frame")
            if not self._is_greeted and (kind != frames.SETTINGS or flags & frames.ACK):
                raise Broken(Fault.PROTOCOL_ERROR, "the first frame is SETTINGS")
            if kind < len(on_frame):
                on_frame[kind](self, flags, stream_id & 0x7FFFFFFF, payload)
            else:
                self._spend(1)
        self._left = data[place:]

    def _greet(self, data: bytes) -> bytes:
        wanted = self._preface_left
        got = data[: len(wanted)]
        if not wanted.startswith(got):
            raise Broken(Fault.PROTOCOL_ERROR, "this is not HTTP/2")
        self._preface_left = wanted[len(got) :]
        self._left = b""
        return data[len(got) :]

    def _spend(self, cost: int) -> None:
        self._patience -= cost
        if self._patience < 0:
            raise Broken(Fault.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    # -- frames of calls

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._credit -= size
        if self._credit <= CONNECTION_WINDOW // 2:
            self._out.append(frames.window_update(0, CONNECTION_WINDOW - self._credit))
            self._credit = CONNECTION_WINDOW
        stream = self._streams.get(stream_id)
        if stream is None or stream.is_heard:
            self._check_known(stream_id, "data")
            if stream is not None:
                raise Broken(Fault.STREAM_CLOSED, "data after the end of a stream")
            self._spend(1)
            return
        stream.credit -= size
        if flags & frames.PADDED:
            payload = frames.unpadded(payload, flags)
        if len(payload) < TINY_BYTES and not flags & frames.END_STREAM:
            self._spend(1)
        if self._gather(stream, payload):
            if flags & frames.END_STREAM:
                self._heard(stream)
            elif stream.credit <= STREAM_WINDOW // 2:
                self._out.append(frames.window_update(stream_id, STREAM_WINDOW - stream.credit))
                stream.credit = STREAM_WINDOW

    def _gather(self, stream: Stream, payload: bytes) -> bool:
        """Add to a stream's message; False when the stream was ended for it."""
        self._budget.held_bytes += len(payload)
        stream.fed_us = self._now_us
        if not stream.body:
            stream.body = payload
        elif isinstance(stream.body, bytearray):
            stream.body += payload
        else:
            stream.body = bytearray(stream.body) + payload
        if self._budget.held_bytes > self._budget.bytes_max:
            return self._refuse(
                stream, Code.RESOURCE_EXHAUSTED, "more messages than are held at a time; try again later"
            )
        held = len(stream.body)
        if stream.expected < 0 and held >= PREFIX_BYTES:
            stream.expected = int.from_bytes(stream.body[1:PREFIX_BYTES], "big")
            if stream.expected > self.bounds.message_bytes_max:
                what = f"a message of {stream.expected} bytes; at most {self.bounds.message_bytes_max}"
                return self._refuse(stream, Code.RESOURCE_EXHAUSTED, what)
        if stream.expected >= 0 and held > PREFIX_BYTES + stream.expected:
            return self._refuse(stream, Code.UNIMPLEMENTED, "more than one message, or bytes after it")
        return True

    def _refuse(self, stream: Stream, code: Code, what: str) -> bool:
        """End a stream from here: a server says why, a client's caller hears it."""
        if self.is_client:
            trailers = {"grpc-status": str(int(code)), "grpc-message": percent(what)}
            self._events.append(Answer(stream.id, stream.headers or {}, trailers, None, is_packed=False))
            self.reset(stream.id, Fault.CANCEL)
        else:
            self.fail(stream.id, code, what)
        return False

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise Broken(Fault.PROTOCOL_ERROR, "headers of no stream")
        block = frames.unpadded(payload, flags)
        if flags & frames.WITH_PRIORITY:
            if len(block) < 5:
                raise Broken(Fault.FRAME_SIZE_ERROR, "headers without their priority")
            block = block[5:]
        if flags & frames.END_HEADERS:
            self._on_block(flags, stream_id, block)
        else:
            self._partial, self._partials_count = (flags, stream_id, bytearray(block)), 0

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._partial is None or self._partial[1] != stream_id:
            raise Broken(Fault.PROTOCOL_ERROR, "a header block goes on that had not begun")
        first_flags, _, block = self._partial
        block += payload
        self._partials_count += 1
        if len(block) > BLOCK_BYTES_MAX or self._partials_count > CONTINUATIONS_MAX:
            raise Broken(Fault.ENHANCE_YOUR_CALM, f"a header block of more than {BLOCK_BYTES_MAX} bytes, or in crumbs")
        if flags & frames.END_HEADERS:
            self._partial = None
            self._on_block(first_flags, stream_id, bytes(block))

    def _on_block(self, flags: int, stream_id: int, block: bytes) -> None:
        headers = self._reader.read(block)
        stream = self._streams.get(stream_id)
        if stream is None:
            if self.is_client:
                self._check_known(stream_id, "headers")
                self._spend(1)
                return
            stream = self._opened(stream_id, headers)
            if stream is None:
                return
        elif stream.is_heard:
            raise Broken(Fault.STREAM_CLOSED, "headers after the end of a stream")
        elif not self._more_headers(stream, headers, is_end=bool(flags & frames.END_STREAM)):
            return
        if flags & frames.END_STREAM:
            self._heard(stream)

    def _more_headers(self, stream: Stream, headers: Headers | None, *, is_end: bool) -> bool:
        """An answer's headers, or what follows a message; False when the stream was ended for it."""
        if headers is None:
            self._forfeit(stream, "an answer's headers can't be read")
            return False
        if self.is_client and stream.headers is None:
            if headers.get(":status", "").startswith("1"):
                self._spend(1)
                return False
            stream.headers = headers
            if is_end:
                stream.trailers = headers
            return True
        if not is_end:
            self._forfeit(stream, "trailers that don't end their stream")
            return False
        stream.trailers = headers
        return True

    def _forfeit(self, stream: Stream, what: str) -> None:
        """The peer broke the protocol on one stream."""
        self._spend(RESET_COST)
        if self.is_client:
            self._refuse(stream, Code.INTERNAL, what)
        else:
            self._events.append(Reset(stream.id, Fault.PROTOCOL_ERROR))
            self._lingering.add(stream.id)
            self.reset(stream.id, Fault.PROTOCOL_ERROR)

    def _opened(self, stream_id: int, headers: Headers | None) -> Stream | None:
        if not stream_id & 1:
            raise Broken(Fault.PROTOCOL_ERROR, "a stream with the number of a server's")
        if stream_id <= self.last_id:
            self._spend(1)  # it may have been on its way when we ended the stream
            return None
        self.last_id = stream_id
        if headers is None or not {":method", ":path", ":scheme"} <= headers.keys() or ":status" in headers:
            self._spend(RESET_COST)
            self._out.append(frames.rst_stream(stream_id, Fault.PROTOCOL_ERROR))
            return None
        if self.is_leaving or len(self._streams) + len(self._lingering) >= self.bounds.calls_max:
            self._spend(1)
            self._out.append(frames.rst_stream(stream_id, Fault.REFUSED_STREAM))
            return None
        stream = self._streams[stream_id] = Stream(stream_id, self._stream_window)
        stream.headers, stream.fed_us = headers, self._now_us
        if headers[":method"] != "POST" or not headers.get("content-type", "").startswith(CONTENT_TYPE):
            self._spend(1)
            self._end(stream, _NOT_GRPC)
            return None
        return stream

    def _heard(self, stream: Stream) -> None:
        stream.is_heard = True
        self._patience = min(PATIENCE_MAX, self._patience + PATIENCE_PER_CALL)
        is_whole = stream.expected >= 0 and len(stream.body) == PREFIX_BYTES + stream.expected
        if self.is_client:
            self._answered(stream, is_whole=is_whole)
        elif not is_whole:
            self.fail(stream.id, Code.INTERNAL, "a call without a whole message")
        elif stream.body[0] > 1:
            self.fail(stream.id, Code.INTERNAL, "a message whose first byte is neither 0 nor 1")
        else:
            assert stream.headers is not None
            message = bytes(stream.body[PREFIX_BYTES:])
            self._events.append(Request(stream.id, stream.headers, message, bool(stream.body[0])))

    def _answered(self, stream: Stream, *, is_whole: bool) -> None:
        if stream.headers is None or (stream.body and not is_whole):
            self._refuse(stream, Code.INTERNAL, "an answer that ends in the middle")
            return
        trailers = stream.trailers if stream.trailers is not None else {}
        message = bytes(stream.body[PREFIX_BYTES:]) if is_whole else None
        self._events.append(Answer(stream.id, stream.headers, trailers, message, bool(stream.body[:1] == b"\x01")))
        if not stream.is_said:
            self._out.append(frames.rst_stream(stream.id, Fault.CANCEL))
        self._forget(stream)

    # -- frames of the connection

    def _on_priority(self, _flags: int, _stream_id: int, payload: bytes) -> None:
        self._spend(1)
        if len(payload) != 5:
            raise Broken(Fault.FRAME_SIZE_ERROR, "a priority has five bytes")

    def _on_reset(self, _flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Broken(Fault.FRAME_SIZE_ERROR, "a reset has four bytes")
        self._check_known(stream_id, "a reset")
        self._spend(RESET_COST)
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if stream.is_heard and not self.is_client:
            self._lingering.add(stream_id)  # its handler has yet to end, and counts until then
        self._forget(stream)
        self._events.append(Reset(stream_id, frames.WORD.unpack(payload)[0]))

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._spend(SETTINGS_COST)
        if stream_id:
            raise Broken(Fault.PROTOCOL_ERROR, "settings of a stream")
        if flags & frames.ACK:
            if payload:
                raise Broken(Fault.FRAME_SIZE_ERROR, "an acknowledgement with settings")
            return
        if len(payload) % frames.SETTING.size:
            raise Broken(Fault.FRAME_SIZE_ERROR, "settings that end in the middle of one")
        self._is_greeted = True
        for name, value in frames.SETTING.iter_unpack(payload):
            self._set(name, value)
        self._out.append(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def _set(self, name: int, value: int) -> None:
        if name == frames.INITIAL_WINDOW_SIZE:
            if value > frames.WINDOW_MAX:
                raise Broken(Fault.FLOW_CONTROL_ERROR, "a window of more than 2^31-1 bytes")
            change, self._stream_window = value - self._stream_window, value
            for stream in self._streams.values():
                stream.window += change
                if stream.window > frames.WINDOW_MAX:
                    raise Broken(Fault.FLOW_CONTROL_ERROR, "a window of more than 2^31-1 bytes")
        elif name == frames.MAX_FRAME_SIZE:
            if not FRAME_BYTES <= value < 1 << 24:
                raise Broken(Fault.PROTOCOL_ERROR, "a frame size out of its bounds")
            self._frame_max = min(value, TAKE_BYTES)
        elif name == frames.ENABLE_PUSH:
            if value > 1 or (self.is_client and value):
                raise Broken(Fault.PROTOCOL_ERROR, "push is on or off, and never a server's")
        elif name == frames.MAX_CONCURRENT_STREAMS:
            self.peer_calls_max = value

    def _on_push(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise Broken(Fault.PROTOCOL_ERROR, "nobody asked for a push")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Broken(Fault.PROTOCOL_ERROR, "a ping of a stream")
        if len(payload) != 8:
            raise Broken(Fault.FRAME_SIZE_ERROR, "a ping has eight bytes")
        self._spend(1)
        if flags & frames.ACK:
            self.heard_pings_count += 1
        else:
            self._out.append(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _on_goaway(self, _flags: int, stream_id: int, payload: bytes) -> None:
        self._spend(SETTINGS_COST)
        if stream_id or len(payload) < 8:
            raise Broken(Fault.PROTOCOL_ERROR, "no GOAWAY at all")
        last_id, fault = (word for (word,) in frames.WORD.iter_unpack(payload[:8]))
        self.is_told_away = True
        self._events.append(Away(last_id & 0x7FFFFFFF, fault))

    def _on_window(self, _flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Broken(Fault.FRAME_SIZE_ERROR, "a window update has four bytes")
        self._spend(1)
        increment = frames.WORD.unpack(payload)[0] & 0x7FFFFFFF
        if not stream_id:
            self._window += increment
            if not increment or self._window > frames.WINDOW_MAX:
                raise Broken(Fault.FLOW_CONTROL_ERROR if increment else Fault.PROTOCOL_ERROR, "a window out of bounds")
            return
        self._check_known(stream_id, "a window")
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.window += increment
            if not increment or stream.window > frames.WINDOW_MAX:
                raise Broken(Fault.FLOW_CONTROL_ERROR if increment else Fault.PROTOCOL_ERROR, "a window out of bounds")

    def _check_known(self, stream_id: int, what: str) -> None:
        """Raises `Broken` for a stream that nobody has opened."""
        newest = self._next_id - 2 if self.is_client else self.last_id
        if not stream_id & 1 or stream_id > newest:
            raise Broken(Fault.PROTOCOL_ERROR, f"{what} of a stream that was never opened")

    def stalled(self, before_us: int) -> list[int]:
        """Calls whose message is not whole, and of which nothing came since then."""
        return [stream.id for stream in self._streams.values() if not stream.is_heard and stream.fed_us < before_us]

    def close(self) -> list[int]:
        """The connection is gone: the numbers of the calls that it takes with it."""
        self.is_broken = True
        open_ids = list(self._streams)
        for stream in tuple(self._streams.values()):
            self._forget(stream)
        return open_ids

    _FRAMES: ClassVar = (
        _on_data,
        _on_headers,
        _on_priority,
        _on_reset,
        _on_settings,
        _on_push,
        _on_ping,
        _on_goaway,
        _on_window,
        _on_continuation,
    )
